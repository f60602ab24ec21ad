"""Scores against pycocotools itself and its published numbers, and detections of a real network."""

import contextlib
import copy
import io
import json
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file, save_file

from pipeline.config.sections import METRICS, EvaluateSection, Metric
from pipeline.data.labels import Category, LabelMap
from pipeline.data.loader import eval_batches
from pipeline.data.manifest import Manifest
from pipeline.errors import UserError
from pipeline.evaluate.detect import detect, sort_detections
from pipeline.evaluate.results import evaluate_checkpoint, evaluate_files
from pipeline.evaluate.score import score
from tests.builders import make_varied_manifest, write_checkpoint

EMPTY: dict[str, Any] = {"images": [{"id": 1, "width": 64, "height": 64}], "categories": [{"id": 3, "name": "cat"}]}


def test_the_metrics_have_the_names_of_the_configuration() -> None:
    assert get_args(Metric) == tuple(METRICS)


def make_scene(seed: int, images: int = 12) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Random ground truth of all sizes with crowds and empty images, and detections near it, beside it and tied."""
    random = np.random.default_rng(seed)
    categories = [{"id": number, "name": f"kind {number}"} for number in (2, 3, 7, 90)]
    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image_id in range(1, images + 1):
        for _ in range(int(random.integers(0, 8)) if image_id % 4 else 0):
            x, y, w, h = random.uniform(0, 300), random.uniform(0, 300), *np.exp(random.uniform(1, 5.5, 2))
            category = int(random.choice([2, 3, 7]))
            truth = {"image_id": image_id, "category_id": category, "bbox": [x, y, w, h], "area": 0.8 * w * h}
            annotations.append({**truth, "id": len(annotations) + 1, "iscrowd": int(random.random() < 0.15)})
            for _ in range(int(random.integers(0, 3))):
                moved = [x + random.normal(0, 0.1 * w), y, w * random.uniform(0.8, 1.25), h]
                guess = category if random.random() < 0.8 else int(random.choice([2, 3, 7, 90]))
                value = round(float(random.random()), 1)
                detections.append({"image_id": image_id, "category_id": guess, "bbox": moved, "score": value})
    document = {
        "images": [{"id": number, "width": 640, "height": 640} for number in range(1, images + 1)],
        "annotations": annotations,
        "categories": categories,
    }
    return document, detections


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
    def test_published_numbers(self, shared_data: Path, tmp_path: Path) -> None:
        folder = shared_data / "cocoapi_val2014_100"
        metrics = evaluate_files(
            folder / "instances_val2014_100.json", folder / "instances_val2014_fakebbox100_results.json", tmp_path
        )
        expected = json.loads((folder / "expected_stats.json").read_text())["bbox"]
        assert [metrics[name] for name in METRICS] == expected
        written = json.loads((tmp_path / "metrics.json").read_text())
        assert [written[name] for name in METRICS] == expected
        assert written["per_category"].keys() == metrics["per_category"].keys()

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
            evaluate_files(tmp_path / "truth.json", path, tmp_path / "out")
        assert not (tmp_path / "out").exists()

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


def test_order_of_detections_is_that_of_no_share() -> None:
    _, detections = make_scene(2)
    shuffled = [detections[index] for index in np.random.default_rng(0).permutation(len(detections))]
    assert sort_detections(shuffled) == sort_detections(detections)
    keys = [(d["image_id"], -d["score"]) for d in sort_detections(shuffled)]
    assert keys == sorted(keys)


SECTION = EvaluateSection(batch_size=2, short_side=48, max_side=64, max_detections=10)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_varied_manifest(tmp_path_factory.mktemp("split"), 5)


@pytest.fixture(scope="module")
def checkpoint(split: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run"), split.labels)


class TestDetect:
    def test_result_format(self, split: Manifest, checkpoint: Path) -> None:
        counted: list[int] = []
        detections = detect(checkpoint, split, eval_batches(split, 2), SECTION, "cpu", counted.append)
        assert counted == [2, 2, 1]
        assert {d["image_id"] for d in detections} == {1, 2, 3, 4, 5}
        assert {d["category_id"] for d in detections} <= {1, 3, 90}
        assert len(detections) == 50
        assert all(len(d["bbox"]) == 4 and 0 <= d["score"] <= 1 for d in detections)
        assert set(detections[0]) == {"image_id", "category_id", "bbox", "score"}
        json.dumps(detections, allow_nan=False)

    def test_shares_make_the_same(self, split: Manifest, checkpoint: Path) -> None:
        batches = eval_batches(split, 2)
        whole = detect(checkpoint, split, batches, SECTION, "cpu")
        shares = [detect(checkpoint, split, batches[start::2], SECTION, "cpu") for start in range(2)]
        assert sort_detections([entry for share in reversed(shares) for entry in share]) == whole

    def test_boxes_are_not_clipped(self, split: Manifest, tmp_path: Path) -> None:
        checkpoint = write_checkpoint(tmp_path, split.labels)
        weights = load_file(checkpoint / "model.safetensors")
        for name in weights:
            if re.fullmatch(r"bbox_embed\.\d+\.layers\.2\.bias", name):
                weights[name][2:] = 4.0
        save_file(weights, checkpoint / "model.safetensors")
        detections = detect(checkpoint, split, eval_batches(split, 2), SECTION, "cpu")
        assert any(min(d["bbox"][:2]) < 0 for d in detections)

    def test_spoilt_weights_are_no_detections(self, split: Manifest, tmp_path: Path) -> None:
        checkpoint = write_checkpoint(tmp_path, split.labels)
        weights = load_file(checkpoint / "model.safetensors")
        save_file({name: tensor * float("nan") for name, tensor in weights.items()}, checkpoint / "model.safetensors")
        with pytest.raises(FloatingPointError, match="not finite"):
            detect(checkpoint, split, eval_batches(split, 2), SECTION, "cpu")

    def test_other_categories_are_refused(self, split: Manifest, tmp_path: Path) -> None:
        other = write_checkpoint(tmp_path, LabelMap("contiguous", (Category(1, "cat"), Category(2, "bird"))))
        with pytest.raises(UserError, match=r"trained on other categories .*bird"):
            detect(other, split, eval_batches(split, 2), SECTION, "cpu")


class TestEvaluateCheckpoint:
    def test_done_once(self, split: Manifest, checkpoint: Path, tmp_path: Path) -> None:
        calls: list[Path] = []

        def detect_all(path: Path, batches: list[list[int]]) -> list[list[dict[str, Any]]]:
            calls.append(path)
            return [detect(path, split, [batch], SECTION, "cpu") for batch in batches]

        metrics, new = evaluate_checkpoint(checkpoint, split, SECTION, tmp_path, detect_all)
        again, new_again = evaluate_checkpoint(checkpoint, split, SECTION, tmp_path, detect_all)
        assert (new, new_again, len(calls)) == (True, False, 1)
        assert again == metrics
        assert metrics["step"] == 5
        assert metrics["inputs"]["val_digest"] == split.digest
        assert set(metrics["per_category"]) == {"cat", "dog", "toothbrush"}
        assert len(json.loads((tmp_path / "detections.json").read_text())) == 50

    def test_other_settings_are_refused(self, split: Manifest, checkpoint: Path, tmp_path: Path) -> None:
        evaluate_checkpoint(checkpoint, split, SECTION, tmp_path, lambda path, batches: [])
        other = SECTION.model_copy(update={"short_side": 40, "pictures": 1})
        with pytest.raises(UserError, match=r"short_side: 48 -> 40\)"):
            evaluate_checkpoint(checkpoint, split, other, tmp_path, lambda path, batches: [])

    def test_other_weights_are_scored_anew(self, split: Manifest, checkpoint: Path, tmp_path: Path) -> None:
        evaluate_checkpoint(checkpoint, split, SECTION, tmp_path / "out", lambda path, batches: [])
        other = write_checkpoint(tmp_path, split.labels, seed=1)
        assert evaluate_checkpoint(other, split, SECTION, tmp_path / "out", lambda path, batches: [])[1]
