"""Scores against pycocotools itself and its published numbers."""

import contextlib
import copy
import importlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.config.sections import METRICS
from pipeline.errors import UserError
from pipeline.evaluate.documents import IouType
from pipeline.evaluate.score import NUMBERS, score
from tests.pipeline.evaluate.scenes import EMPTY, make_scene, scenes


def pycocotools_stats(
    document: dict[str, Any], detections: list[dict[str, Any]], iou_type: str = "bbox"
) -> list[float]:
    """The numbers that pycocotools prints, of detections that are not none."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(document)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(detections)), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


class TestScore:
    @pytest.mark.parametrize("iou_type", ["bbox", "segm"])
    def test_published_numbers(self, shared_data: Path, iou_type: IouType) -> None:
        folder = shared_data / "cocoapi_val2014_100"
        detections = folder / f"instances_val2014_fake{iou_type}100_results.json"
        metrics = score(folder / "instances_val2014_100.json", detections, iou_type, verify=True)
        expected = json.loads((folder / "expected_stats.json").read_text())[iou_type]
        assert [metrics[name] for name in METRICS] == expected

    @pytest.mark.parametrize("seed", range(4))
    def test_equals_pycocotools(self, seed: int) -> None:
        document, detections = make_scene(seed)
        metrics = score(document, detections)
        assert [metrics[name] for name in METRICS] == pycocotools_stats(document, detections)
        for category in document["categories"]:
            alone = copy.deepcopy(document)
            alone["categories"] = [category]
            alone["annotations"] = [a for a in alone["annotations"] if a["category_id"] == category["id"]]
            its = [d for d in detections if d["category_id"] == category["id"]]
            expected = pycocotools_stats(alone, its) if its and alone["annotations"] else None
            if expected is not None:
                assert [metrics["per_category"][category["name"]][name] for name in METRICS] == expected

    def test_prints_nothing_and_changes_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        document, detections = make_scene(0)
        before = copy.deepcopy((document, detections))
        score(document, detections)
        assert capsys.readouterr().out == ""
        assert (document, detections) == before

    def test_ground_truth_as_detections_is_perfect(self) -> None:
        document, _ = make_scene(1)
        detections = [
            {key: annotation[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
            for annotation in document["annotations"]
            if not annotation["iscrowd"]
        ]
        metrics = score(document, detections)
        assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == 1.0

    def test_no_detections(self) -> None:
        document, _ = make_scene(1)
        metrics = score(document, [])
        assert metrics["AP"] == metrics["AR100"] == 0.0
        assert metrics["per_category"]["kind 90"]["AP"] == -1.0

    @pytest.mark.parametrize("detections", [[], [dict(image_id=1, category_id=3, bbox=[0, 0, 5, 5], score=0.5)]])
    def test_no_objects(self, detections: list[dict[str, Any]]) -> None:
        metrics = score(EMPTY, detections)
        assert {metrics[name] for name in METRICS} == {-1.0}
        assert set(metrics["per_category"]["cat"].values()) == {-1.0}

    def test_no_images(self) -> None:
        assert score({"images": [], "categories": []}, [])["AP"] == -1.0

    def test_defaults_of_sparse_annotations(self) -> None:
        annotation = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 0, 40, 40]}
        metrics = score(
            {**EMPTY, "annotations": [annotation]}, [dict(image_id=1, category_id=3, bbox=[0, 0, 40, 40], score=1)]
        )
        assert (metrics["AP"], metrics["APs"]) == (pytest.approx(1.0), -1.0)

    def test_categories_of_the_same_name(self) -> None:
        document = {**EMPTY, "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "cat"}]}
        assert set(score(document, [])["per_category"]) == {"cat (3)", "cat (5)"}


class TestArbiter:
    """hotcoco against pycocotools, which is given the ids as they are and prepares the detections itself."""

    @pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
    @given(data=st.data())
    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def test_no_digit_differs(self, iou_type: IouType, data: st.DataObject) -> None:
        document, detections = data.draw(scenes(iou_type))
        metrics = score(document, detections, iou_type, verify=True)
        if detections:
            expected = pycocotools_stats(document, detections, iou_type)
            assert [metrics[name] for name in NUMBERS[iou_type]] == expected

    @given(data=st.data())
    @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def test_ids_do_not_matter(self, data: st.DataObject) -> None:
        """Of text, negative, or 0, which pycocotools takes for no match."""
        document, detections = data.draw(scenes("bbox"))
        expected = score(document, detections)
        for rename in (lambda number: f"{number:06}", lambda number: number - 1):
            renamed = copy.deepcopy(document)
            for entry in (*renamed["images"], *renamed["categories"], *renamed["annotations"]):
                entry["id"] = rename(entry["id"])
            found = copy.deepcopy(detections)
            for entry in (*renamed["annotations"], *found):
                entry["image_id"], entry["category_id"] = rename(entry["image_id"]), rename(entry["category_id"])
            assert score(renamed, found, verify=True) == expected

    @pytest.mark.parametrize(("category", "told"), [(None, "AP50"), (2, "AP50 of kind 7")])
    def test_one_digit_that_differs_is_told(
        self, category: int | None, told: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scoring = importlib.import_module("pipeline.evaluate.score")  # the package has a function of that name
        engine = scoring._metrics

        def a_bit_less(evaluation: Any, *arguments: Any) -> dict[str, Any]:
            metrics = engine(evaluation, *arguments)
            if not isinstance(evaluation, COCOeval):
                numbers = metrics if category is None else metrics["per_category"][f"kind {(2, 3, 7)[category]}"]
                numbers["AP50"] = math.nextafter(numbers["AP50"], 0)
            return metrics

        document, detections = make_scene(1)
        wanted = score(document, detections)
        wanted = wanted if category is None else wanted["per_category"]["kind 7"]
        monkeypatch.setattr(scoring, "_metrics", a_bit_less)
        one_less = math.nextafter(wanted["AP50"], 0)
        with pytest.raises(UserError, match=rf"^{told} is {one_less!r} by hotcoco and {wanted['AP50']!r} by pycoco"):
            score(document, detections, verify=True)
