"""Detections of a real network, whoever makes which share."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from pipeline.config.sections import EvaluateSection
from pipeline.data.labels import Category, LabelMap
from pipeline.data.loader import eval_batches
from pipeline.data.manifest import Manifest
from pipeline.errors import UserError
from pipeline.evaluate.detect import detect, sort_detections
from tests.builders import write_checkpoint
from tests.pipeline.evaluate.scenes import make_scene

SECTION = EvaluateSection(batch_size=2, short_side=48, max_side=64, max_detections=10)


def test_order_of_detections_is_that_of_no_share() -> None:
    _, detections = make_scene(2)
    shuffled = [detections[index] for index in np.random.default_rng(0).permutation(len(detections))]
    assert sort_detections(shuffled) == sort_detections(detections)
    keys = [(d["image_id"], -d["score"]) for d in sort_detections(shuffled)]
    assert keys == sorted(keys)


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

    def test_bf16_is_another_arithmetic(self, split: Manifest, checkpoint: Path) -> None:
        batches = eval_batches(split, 2)
        found = {
            precision: detect(checkpoint, split, batches, SECTION.model_copy(update={"precision": precision}), "cpu")
            for precision in ("fp32", "bf16")
        }
        best = {precision: {d["image_id"]: d["score"] for d in reversed(each)} for precision, each in found.items()}
        assert best["bf16"] != best["fp32"]
        assert best["bf16"] == pytest.approx(best["fp32"], abs=0.02)

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
        with pytest.raises(UserError, match="not finite"):
            detect(checkpoint, split, eval_batches(split, 2), SECTION, "cpu")

    def test_other_categories_are_refused(self, split: Manifest, tmp_path: Path) -> None:
        other = write_checkpoint(tmp_path, LabelMap("contiguous", (Category(1, "cat"), Category(2, "bird"))))
        with pytest.raises(UserError, match=r"trained on other categories .*bird"):
            detect(other, split, eval_batches(split, 2), SECTION, "cpu")
