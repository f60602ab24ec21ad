"""The constant box: what it is, and that a detector that gives it is told."""

from typing import Any

import pytest

from pipeline.evaluate.baseline import box_variety, constant_boxes
from pipeline.evaluate.detect import Detection
from pipeline.evaluate.score import score


def truth(*boxes: tuple[int, int, list[float]], crowds: tuple[int, ...] = ()) -> dict[str, object]:
    """A document of two images; the boxes are (image, category, xywh)."""
    annotations = [
        {
            "id": number, "image_id": image, "category_id": category, "bbox": box,
            "area": box[2] * box[3], "iscrowd": int(number in crowds),
        }
        for number, (image, category, box) in enumerate(boxes, start=1)
    ]  # fmt: skip
    images = [{"id": 1, "width": 100, "height": 50}, {"id": 2, "width": 200, "height": 100}]
    return {"images": images, "annotations": annotations, "categories": [{"id": c, "name": str(c)} for c in (1, 2)]}


def test_the_mean_box_of_each_category_on_every_image() -> None:
    document = truth((1, 1, [10, 10, 20, 20]), (2, 1, [100, 40, 80, 40]), (2, 2, [0, 0, 200, 100]))
    found = constant_boxes(document)
    assert [(each["image_id"], each["category_id"], each["score"]) for each in found] == [
        (1, 1, 1.0), (1, 2, 0.5), (2, 1, 1.0), (2, 2, 0.5),
    ]  # fmt: skip
    # Centres 0.2, 0.4 and 0.7, 0.6; sides 0.2, 0.4 and 0.4, 0.4.
    assert found[0]["bbox"] == pytest.approx([45 - 15, 25 - 10, 30, 20])
    assert found[2]["bbox"] == pytest.approx([90 - 30, 50 - 20, 60, 40])
    assert found[3]["bbox"] == pytest.approx([0, 0, 200, 100])


def test_objects_that_lie_alike_are_all_found() -> None:
    document = truth((1, 1, [10, 10, 20, 20]), (2, 1, [20, 20, 40, 40]))
    assert score(document, constant_boxes(document))["AP"] == pytest.approx(1)


def test_crowds_and_empty_splits_have_none() -> None:
    assert constant_boxes(truth((1, 1, [10, 10, 20, 20]), crowds=(1,))) == []
    assert constant_boxes({"images": [], "annotations": [], "categories": []}) == []


VARIED: dict[str, Any] = {
    "images": [{"id": n, "width": 100, "height": 50} for n in range(10)],
    "annotations": [
        {"image_id": n, "category_id": 1, "bbox": [n, 10, 20 + 4 * n, 20], "iscrowd": 0, "id": n} for n in range(10)
    ],
    "categories": [{"id": 1, "name": "a"}],
}


class TestVariety:
    def found(self, slope: float, count: int = 10) -> list[Detection]:
        best = [{"image_id": n, "category_id": 1, "bbox": [slope * n, 10, 20 + 4 * slope * n, 20], "score": 0.9}
                for n in range(count)]  # fmt: skip
        return best + [{**each, "bbox": [0, 0, 90, 45], "score": 0.1} for each in best]

    def test_it_is_that_of_the_best_boxes(self) -> None:
        assert box_variety(VARIED, self.found(1)) == pytest.approx(1)
        assert box_variety(VARIED, self.found(0.1)) == pytest.approx(0.1)
        assert box_variety(VARIED, constant_boxes(VARIED)) == pytest.approx(0)

    def test_little_tells_nothing(self) -> None:
        assert box_variety(VARIED, self.found(1, count=7)) is None
        alike = [{**each, "bbox": [1, 1, 5, 5]} for each in VARIED["annotations"]]
        assert box_variety({**VARIED, "annotations": alike}, self.found(1)) is None
