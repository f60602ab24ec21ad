"""Scores against pycocotools itself and its published numbers."""

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.config.sections import METRICS
from pipeline.errors import UserError
from pipeline.evaluate.score import score
from tests.pipeline.evaluate.scenes import EMPTY, make_scene


def pycocotools_stats(document: dict[str, Any], detections: list[dict[str, Any]]) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(document)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(detections)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


class TestScore:
    def test_published_numbers(self, shared_data: Path) -> None:
        folder = shared_data / "cocoapi_val2014_100"
        metrics = score(folder / "instances_val2014_100.json", folder / "instances_val2014_fakebbox100_results.json")
        expected = json.loads((folder / "expected_stats.json").read_text())["bbox"]
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


GOOD = {"image_id": 1, "category_id": 3, "bbox": [1.0, 2.0, 3.0, 4.0], "score": 0.5}


class TestBadInput:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            pytest.param("{", "is not JSON", id="not JSON"),
            pytest.param("{}", "must be a list", id="not a list"),
            pytest.param("[3]", "entry 0: must be an object", id="not an object"),
            pytest.param([GOOD, {**GOOD, "image_id": 7}], "entry 1: image_id 7 is not in", id="unknown image"),
            pytest.param([{**GOOD, "image_id": "1"}], "entry 0: image_id '1' is not in", id="image id as text"),
            pytest.param([{**GOOD, "image_id": [1]}], r"image_id \[1\] is not in", id="image id as list"),
            pytest.param([{**GOOD, "category_id": 1}], "entry 0: category_id 1 is not in", id="unknown category"),
            pytest.param([{**GOOD, "score": float("nan")}], "entry 0 .image 1.: score is nan", id="NaN score"),
            pytest.param([{**GOOD, "score": None}], "score is None", id="null score"),
            pytest.param([{**GOOD, "bbox": [0, float("nan"), 1, 1]}], "bbox is .*nan", id="NaN box"),
            pytest.param([{**GOOD, "bbox": [0, 1, 1]}], "bbox is .*4 finite numbers", id="three numbers"),
            pytest.param([{**GOOD, "bbox": [5, 5, -1, 1]}], "negative width", id="negative width"),
            pytest.param([{k: GOOD[k] for k in GOOD if k != "score"}], "entry 0: `score` is missing", id="no score"),
            pytest.param([{k: GOOD[k] for k in GOOD if k != "bbox"}], "entry 0: `bbox` is missing", id="no box"),
        ],
    )
    def test_detections(self, content: Any, message: str, tmp_path: Path) -> None:
        (tmp_path / "truth.json").write_text(json.dumps(EMPTY))
        path = tmp_path / "found.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(UserError, match=rf"found\.json.*{message}"):
            score(tmp_path / "truth.json", path)

    def test_missing_files(self, tmp_path: Path) -> None:
        (tmp_path / "truth.json").write_text(json.dumps(EMPTY))
        with pytest.raises(UserError, match=r"found\.json: cannot read the detections file"):
            score(tmp_path / "truth.json", tmp_path / "found.json")
        with pytest.raises(UserError, match=r"none\.json: cannot read the annotation file"):
            score(tmp_path / "none.json", [])

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            pytest.param([], "needs the lists", id="not COCO"),
            pytest.param({**EMPTY, "images": [{"id": 1}, {"id": 1}]}, "`images` has", id="image twice"),
            pytest.param(
                {**EMPTY, "annotations": [{"id": 5}]}, r"annotations\[0\] has no `image_id`", id="no image id"
            ),
            pytest.param(
                {**EMPTY, "annotations": [{**GOOD, "id": 5}] * 2},
                "`annotations` has the id 5 twice.*unique",
                id="same id",
            ),
            pytest.param({**EMPTY, "annotations": [{**GOOD, "id": 5, "area": None}]}, "area is None", id="area"),
        ],
    )
    def test_annotations(self, document: Any, message: str, tmp_path: Path) -> None:
        (tmp_path / "truth.json").write_text(json.dumps(document))
        with pytest.raises(UserError, match=rf"truth\.json.*{message}"):
            score(tmp_path / "truth.json", [])
