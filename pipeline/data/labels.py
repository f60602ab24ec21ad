"""Between category ids and the labels (logits) of a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

from pipeline.config.sections import LabelKind
from pipeline.errors import UserError, shown

COCO91_LOGITS = 91


@dataclass(frozen=True)
class Category:
    """One category of a dataset."""

    id: int
    name: str


@dataclass(frozen=True)
class LabelMap:
    """Between category ids and the logits (labels) of a model.

    `contiguous` numbers the categories 0..n-1 in the order of their ids; `coco91` uses the category id itself as the
    label of 91 logits, as the published detectors do.
    """

    kind: LabelKind
    categories: tuple[Category, ...]

    def __post_init__(self) -> None:
        if self.kind not in get_args(LabelKind):
            raise ValueError(f"the label map is of the kind {self.kind!r}, not one of {get_args(LabelKind)}")
        object.__setattr__(self, "categories", tuple(sorted(self.categories, key=lambda category: category.id)))
        if self.kind == "coco91":
            for category in self.categories:
                if not 1 <= category.id < COCO91_LOGITS:
                    raise UserError(
                        f"category {category.id} ({shown(category.name)}) is not in 1..{COCO91_LOGITS - 1}, "
                        "as dataset.labels: coco91 needs; set dataset.labels: contiguous"
                    )

    @property
    def num_classes(self) -> int:
        """Logits of a model for these labels, without "no object"."""
        return COCO91_LOGITS if self.kind == "coco91" else len(self.categories)

    @cached_property
    def names(self) -> dict[int, str]:
        """Category names by category id."""
        return {category.id: category.name for category in self.categories}

    @cached_property
    def _labels(self) -> dict[int, int]:
        if self.kind == "coco91":
            return {category.id: category.id for category in self.categories}
        return {category.id: label for label, category in enumerate(self.categories)}

    @cached_property
    def _category_ids(self) -> dict[int, int]:
        return {label: category_id for category_id, label in self._labels.items()}

    def label(self, category_id: int) -> int:
        """The label of a category id; KeyError for an id that is no category."""
        return self._labels[category_id]

    def category(self, label: int) -> int | None:
        """The category id of a label; None for a logit that is no category."""
        return self._category_ids.get(label)

    def to_json(self) -> dict[str, Any]:
        """A value that `json` can write."""
        return {"kind": self.kind, "categories": [{"id": c.id, "name": c.name} for c in self.categories]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "LabelMap":
        """The inverse of `to_json`."""
        return cls(value["kind"], tuple(Category(int(c["id"]), str(c["name"])) for c in value["categories"]))
