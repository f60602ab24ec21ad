"""Category ids and labels."""

import json
from typing import Any

import pytest

from pipeline.data.labels import Category, LabelMap
from pipeline.errors import UserError
from tests.builders import CATEGORIES


class TestLabelMap:
    categories = tuple(Category(entry["id"], entry["name"]) for entry in CATEGORIES)

    def test_contiguous_follows_the_ids(self) -> None:
        labels = LabelMap("contiguous", self.categories[::-1])
        assert labels.num_classes == 3
        assert [labels.label(category_id) for category_id in (1, 3, 90)] == [0, 1, 2]
        assert [labels.category(label) for label in range(4)] == [1, 3, 90, None]
        assert labels.names == {1: "cat", 3: "dog", 90: "toothbrush"}

    def test_coco91_uses_the_ids(self) -> None:
        labels = LabelMap("coco91", self.categories)
        assert labels.num_classes == 91
        assert labels.label(90) == 90
        assert labels.category(90) == 90
        assert labels.category(0) is None
        assert labels.category(2) is None

    @pytest.mark.parametrize("category_id", [0, 91])
    def test_coco91_refuses_other_ids(self, category_id: int) -> None:
        with pytest.raises(UserError, match=rf"category {category_id} \(x\) is not in 1\.\.90.*contiguous"):
            LabelMap("coco91", (Category(category_id, "x"),))

    @pytest.mark.parametrize("kind", ["contiguous", "coco91"])
    def test_survives_json(self, kind: Any) -> None:
        labels = LabelMap(kind, self.categories)
        assert LabelMap.from_json(json.loads(json.dumps(labels.to_json()))) == labels

    def test_unknown_category_is_an_error(self) -> None:
        with pytest.raises(KeyError):
            LabelMap("contiguous", self.categories).label(2)
