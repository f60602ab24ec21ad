"""Ground truth and detections that cannot be scored, and the numbers that stand for their ids."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.evaluate.documents import detections_of, ground_truth_of
from pipeline.evaluate.score import score
from tests.pipeline.evaluate.scenes import EMPTY

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
            pytest.param(
                {**EMPTY, "annotations": [{**GOOD, "id": 5}, {**GOOD, "id": "6"}]},
                "`annotations` has ids of numbers and of text",
                id="ids of two kinds",
            ),
        ],
    )
    def test_annotations(self, document: Any, message: str, tmp_path: Path) -> None:
        (tmp_path / "truth.json").write_text(json.dumps(document))
        with pytest.raises(UserError, match=rf"truth\.json.*{message}"):
            score(tmp_path / "truth.json", [])

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            pytest.param([[0, 0, 9, 0, 9, 9]], "must be compressed run lengths", id="polygons"),
            pytest.param({"size": [64, 64], "counts": [4096]}, "must be compressed", id="a list of runs"),
            pytest.param({"size": [64, 32], "counts": "PP1"}, r"size \[64, 32\] .height, width", id="size"),
            pytest.param({"size": [64, 64], "counts": "PP3"}, r"do not give an image of \[64, 64\]", id="too few"),
            pytest.param({"size": [64, 64], "counts": "PPp"}, "do not give", id="cut off"),
            pytest.param({"size": [64, 64], "counts": "~\x10é"}, "do not give", id="no run lengths"),
        ],
    )
    def test_masks(self, mask: Any, message: str) -> None:
        truth = ground_truth_of(EMPTY, "segm")
        found = [{"image_id": 1, "category_id": 3, "score": 0.5, "segmentation": mask}]
        with pytest.raises(UserError, match=rf"entry 0 .image 1.: .*{message}"):
            detections_of(found, truth, "segm")

    def test_keypoints(self) -> None:
        truth = ground_truth_of(EMPTY, "keypoints")
        found = [{"image_id": 1, "category_id": 3, "score": 0.5, "keypoints": [1, 2, 2] * 16}]
        with pytest.raises(UserError, match="keypoints must be 51 finite numbers"):
            detections_of(found, truth, "keypoints")

    def test_truth_without_masks(self) -> None:
        with pytest.raises(UserError, match=r"annotation 5 \(entry 0\): `segmentation` is missing"):
            score({**EMPTY, "annotations": [{**GOOD, "id": 5}]}, [], "segm")


def test_numbers_stand_for_ids_in_their_order() -> None:
    annotation = {"id": 0, "image_id": "b", "category_id": -1, "bbox": [0, 0, 4, 4]}
    images = [{"id": "b", "file_name": "b.jpg", "width": 8, "height": 6}, {"id": "a", "width": 8}]
    document = {"images": images, "categories": [{"id": 7}, {"id": -1}]}
    truth = ground_truth_of({**document, "annotations": [annotation]}, "bbox")
    assert (truth.images, truth.categories, truth.names) == ({"a": 1, "b": 2}, {-1: 1, 7: 2}, ["-1", "7"])
    assert (truth.files, truth.sizes) == ({2: "b.jpg", 1: ""}, {2: (8, 6), 1: None})
    (numbered,) = truth.document["annotations"]
    assert (numbered["id"], numbered["image_id"], numbered["category_id"], numbered["area"]) == (1, 2, 1, 16)
