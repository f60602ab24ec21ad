"""What the criterion is given: groups of predictions, each with the objects that it is to find.

Shapes: B batch, Q queries, C logits, n objects of an image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.config import OneToMany
from model.denoising import Noised

NO_LOSS = -1e4
"""A logit whose probability is 0 in every precision."""

Targets = Sequence[Mapping[str, Tensor]]
"""Of each image `labels` int64 [n] and `boxes` [n, 4] cxcywh in 0..1, on the device."""
Matches = list[tuple[Tensor, Tensor]]
"""Of each image the indices of matched queries and of their objects, int64 on the host, in the order of the queries."""


@dataclass(frozen=True)
class Group:
    """Predictions that are matched and scored on their own.

    One-to-many matching is a group whose targets are repeated; denoising queries are one whose matching is given.
    """

    outputs: Mapping[str, Any]
    """`pred_logits` [B, Q, C] and `pred_boxes` [B, Q, 4] cxcywh; what else there is plays no part."""
    targets: Targets
    """What to find. Groups that share it, the object itself, share the work on it."""
    suffix: str = ""
    """What the names of its losses end in."""
    matching: Matches | None = None
    """Which query has which object; one to one by the least cost when None."""
    weight: float = 1.0
    """Factor on the weights of its losses."""
    repeats: int = 1
    """How often the targets have each object; the normalisers count so many."""
    per_image: int | None = None
    """Objects of each image of the batch that the normalisers count, in place of those there are."""


def groups_of(
    outputs: Mapping[str, Any],
    targets: Targets,
    one_to_many: OneToMany | None = None,
    noised: Noised | None = None,
) -> list[Group]:
    """The groups of what a model gives: the last decoder layer, each one before it (`_0`, ...), the proposals (`_enc`),
    and the same layers of the queries that are matched one to many (`_many`, `_many_0`, ...) and of noised objects
    (`_dn`, ...).

    For the proposals every object has the label 0: theirs is the question whether there is an object.

    Args:
        outputs: of the model.
        targets: of each image.
        one_to_many: as the model's config has it.
        noised: what the model was given.
    """
    groups = _layers(outputs, Group(outputs, targets))
    if "enc_outputs" in outputs:
        objects = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
        groups.append(Group(outputs["enc_outputs"], objects, "_enc"))
    if "one_to_many" in outputs:
        assert one_to_many is not None
        times = one_to_many.repeats
        repeated = [
            {"labels": target["labels"].repeat(times), "boxes": target["boxes"].repeat(times, 1)} for target in targets
        ]
        many = outputs["one_to_many"]
        groups += _layers(many, Group(many, repeated, "_many", weight=one_to_many.weight, repeats=times))
    if "denoising" in outputs:
        assert noised is not None
        own = Group({}, targets, "_dn", noised.matching, per_image=noised.labels.shape[1] // 2)
        groups += _layers(_without(noised.empty, outputs["denoising"]), own)
    return groups


def _without(empty: Tensor, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs of all layers, with logits that cost nothing for images without objects, as `empty` [B] says."""
    logits = outputs["pred_logits"].masked_fill(empty[:, None, None], NO_LOSS)
    layers = [_without(empty, layer) for layer in outputs.get("aux_outputs", ())]
    return {**outputs, "pred_logits": logits, "aux_outputs": layers}


def _layers(outputs: Mapping[str, Any], last: Group) -> list[Group]:
    """The group of the last decoder layer, and those like it of the layers before."""
    layers = enumerate(outputs.get("aux_outputs", ()))
    before = [replace(last, outputs=layer, suffix=f"{last.suffix}_{index}") for index, layer in layers]
    return [replace(last, outputs=outputs), *before]


def distinct_targets(groups: Sequence[Group]) -> dict[int, Targets]:
    """The targets of the groups, by `id`, each once."""
    return {id(group.targets): group.targets for group in groups}
