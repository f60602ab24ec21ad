"""Exported detectors, run without this project's code, find what the detector finds."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from model import DetrConfig, ImageBatch
from pipeline.config.sections import EvaluateSection
from pipeline.data.labels import Category, LabelMap
from pipeline.errors import UserError
from pipeline.predict.detector import Detector
from pipeline.predict.export import (
    METADATA,
    NO_CATEGORY,
    SUFFIXES,
    Exported,
    Kind,
    check_export,
    differences,
    export_detector,
)
from tests.builders import make_detector, make_image

LABELS = LabelMap("contiguous", tuple(Category(number * number + 1, f"class {number}") for number in range(5)))
SIZES = EvaluateSection(short_side=64, max_side=96, max_detections=20)
VARIANTS: dict[str, dict[str, Any]] = {
    "single-scale": {"feature_levels": 1},
    "multi-scale": {"feature_levels": 3},
    "refined": {"feature_levels": 3, "with_box_refine": True, "decoder_layers": 2},
    "two-stage": {"feature_levels": 3, "with_box_refine": True, "two_stage": True, "num_queries": 300},
    "detr": {"arch": "detr"},
    "swin": {"feature_levels": 3, "backbone": "swin_nano", "backbone_norm": "frozen_batch_norm"},
    "vit": {"feature_levels": 3, "backbone": "vit_nano", "backbone_norm": "frozen_batch_norm"},
}


def detector_of(variant: str) -> Detector:
    model = make_detector(**({"decoder_layers": 1} | VARIANTS[variant]))
    return Detector(model, model.config, LABELS, SIZES)


def resized(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture as a file takes it, uint8 [3, height, width]."""
    image = Image.fromarray(picture).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.array(image).transpose(2, 0, 1)


def assert_found(
    outputs: Any, number: int, size: tuple[int, int], detector: Detector, picture: NDArray[np.uint8]
) -> None:
    """What a file found in an image of a batch is what the detector finds in the picture that it was resized from."""
    boxes, scores, labels = (torch.as_tensor(output)[number] for output in outputs)
    wanted = detector(picture)
    assert [entry["category_id"] for entry in wanted] == labels.tolist()
    assert scores.tolist() == pytest.approx([entry["score"] for entry in wanted], abs=1e-5)
    scale = torch.tensor([picture.shape[1] / size[1], picture.shape[0] / size[0]])
    corner, end = boxes[:, :2] * scale, boxes[:, 2:] * scale
    found = torch.cat([corner, end - corner], dim=1)
    torch.testing.assert_close(found, torch.tensor([entry["bbox"] for entry in wanted]), atol=0.02, rtol=0)


@pytest.mark.parametrize("variant", ["multi-scale", "refined", "two-stage", "detr", "swin", "vit"])
def test_onnx_finds_what_the_detector_finds(variant: str, tmp_path: Path) -> None:
    detector, out, size = detector_of(variant), tmp_path / "detector.onnx", (64, 85)
    exported = export_detector(detector, out, "onnx", size)
    assert max(exported) < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    picture = make_image(128, 96, seed=1)
    images = resized(picture, size)[None]
    outputs = onnxruntime.InferenceSession(out).run(["boxes", "scores", "labels"], {"images": images})
    assert_found(outputs, 0, size, detector, picture)
    model = onnx.load(out)
    assert {entry.domain for entry in model.opset_import} == {""}
    assert model.opset_import[0].version >= 16
    assert ("GridSample" in {node.op_type for node in model.graph.node}) == (variant != "detr")
    assert str(Path(__file__).parents[3]).encode() not in out.read_bytes()


@pytest.mark.parametrize(("kind", "variant"), [("onnx", "single-scale"), ("torch", "detr")])
def test_batches_of_any_size(kind: Kind, variant: str, tmp_path: Path) -> None:
    detector, out = detector_of(variant), tmp_path / f"detector{SUFFIXES[kind]}"
    export_detector(detector, out, kind, None)
    entry = {METADATA: ""}
    if kind == "onnx":
        session = onnxruntime.InferenceSession(out)
        entry = session.get_modelmeta().custom_metadata_map
    else:
        program = torch.export.load(out, extra_files=entry).module()
    for size, sides, count in (((64, 85), (128, 96), 1), ((96, 64), (120, 180), 3)):
        pictures = [make_image(*sides, seed=seed) for seed in range(count)]
        images = np.stack([resized(picture, size) for picture in pictures])
        if kind == "onnx":
            outputs = session.run(["boxes", "scores", "labels"], {"images": images})
        else:
            with torch.no_grad():
                outputs = program(torch.from_numpy(images))
        for number, picture in enumerate(pictures):
            assert_found(outputs, number, size, detector, picture)
    told = json.loads(entry[METADATA])
    assert told["categories"][2] == {"id": 5, "name": "class 2"}
    assert (told["short_side"], told["max_side"]) == (64, 96)


def test_a_swin_is_exported_for_one_size(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"a\.onnx: a detector with a swin_nano.*give --size HEIGHTxWIDTH, not --dynamic"
    ):
        export_detector(detector_of("swin"), tmp_path / "a.onnx", "onnx", None)
    assert list(tmp_path.iterdir()) == []


class OneBox(torch.nn.Module):
    """A network that finds a dog, and in second place what is no category; a liar's dog is elsewhere once exported."""

    def __init__(self, honest: bool = True) -> None:
        super().__init__()
        self.shift = 0.0 if honest else 0.01

    def forward(self, batch: ImageBatch) -> dict[str, torch.Tensor]:
        logits = torch.full((1, 1, 91), -20.0)
        logits[..., 3], logits[..., 12] = 2.0, 1.0
        left = 0.5 + self.shift * torch.compiler.is_exporting()
        return {"pred_logits": logits, "pred_boxes": torch.tensor([[[left, 0.5, 0.5, 0.25]]])}


def one_box(honest: bool = True) -> Detector:
    labels = LabelMap("coco91", (Category(3, "dog"),))
    return Detector(OneBox(honest), DetrConfig(num_classes=91), labels, EvaluateSection(max_detections=2))


def test_a_logit_without_a_category(tmp_path: Path) -> None:
    export_detector(one_box(), tmp_path / "a.pt2", "torch", (80, 100))
    program = torch.export.load(tmp_path / "a.pt2").module()
    boxes, scores, labels = program(torch.zeros(1, 3, 80, 100, dtype=torch.uint8))
    assert labels.tolist() == [[3, NO_CATEGORY]]
    assert boxes[0, 0].tolist() == [25, 30, 75, 50]
    assert scores[0].tolist() == pytest.approx([0.8808, 0.7311], abs=1e-4)


def test_a_file_that_finds_something_else_is_not_left(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.pt2: not written.*boxes differ by 1\.0e-02 of the image, scores by 0"):
        export_detector(one_box(honest=False), tmp_path / "a.pt2", "torch", (80, 100))
    assert list(tmp_path.iterdir()) == []


def test_spoilt_weights(tmp_path: Path) -> None:
    detector = detector_of("detr")
    torch.nn.init.constant_(detector.model.class_embed.bias, float("nan"))  # type: ignore[union-attr, arg-type]
    with pytest.raises(UserError, match=r"not finite: its weights are spoilt; take others"):
        export_detector(detector, tmp_path / "a.pt2", "torch", (64, 64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "kind", "size", "message"),
    [
        pytest.param("a.pt", "torch", None, r"a\.pt: the name of a file of --to torch ends with \.pt2", id="suffix"),
        pytest.param("there.pt2", "torch", None, r"there\.pt2: is there already; delete it", id="there"),
        pytest.param("none/a.pt2", "torch", None, "its folder does not exist; make it first", id="no folder"),
        pytest.param("a.onnx", "onnx", (800, 32), "--size 800x32: height and width are 64 pixels at least", id="small"),
    ],
)
def test_what_cannot_be_written(
    name: str, kind: Kind, size: tuple[int, int] | None, message: str, tmp_path: Path
) -> None:
    (tmp_path / "there.pt2").touch()
    with pytest.raises(UserError, match=message):
        check_export(tmp_path / name, kind, size)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"--to onnx needs onnxscript: pip install onnxscript"):
        check_export(tmp_path / "a.onnx", "onnx", None)
    check_export(tmp_path / "a.pt2", "torch", None)


class TestDifferences:
    BOXES = torch.tensor([[0.0, 0.0, 10.0, 20.0], [50.0, 20.0, 60.0, 40.0], [5.0, 5.0, 9.0, 9.0]])
    WANTED = (BOXES, torch.tensor([0.9, 0.9, 0.1]), torch.tensor([1, 1, 2]))
    SIZE = (100, 200)

    def test_equal_scores_may_change_places(self) -> None:
        given = (self.BOXES[[1, 0, 2]], *self.WANTED[1:])
        assert differences(self.WANTED, given, self.SIZE) == Exported(0, 0)

    def test_boxes_are_told_in_parts_of_the_sides(self) -> None:
        moved = self.BOXES.clone()
        moved[1] += torch.tensor([4.0, 0.0, 0.0, 1.0])
        assert differences(self.WANTED, (moved, *self.WANTED[1:]), self.SIZE) == pytest.approx((0.02, 0))

    def test_scores(self) -> None:
        given = (self.BOXES, torch.tensor([0.9, 0.88, 0.1]), self.WANTED[2])
        assert differences(self.WANTED, given, self.SIZE) == pytest.approx((0, 0.02), abs=1e-6)

    @pytest.mark.parametrize("kept", [[0, 1], [0, 0, 2]], ids=["one fewer", "one twice"])
    def test_a_missing_one(self, kept: list[int]) -> None:
        boxes, scores, labels = (column[kept] for column in self.WANTED)
        assert differences(self.WANTED, (boxes, scores, labels), self.SIZE).boxes > 0.1

    def test_another_label(self) -> None:
        given = (*self.WANTED[:2], torch.tensor([1, 0, 2]))
        assert differences(self.WANTED, given, self.SIZE).boxes > 0.1

    def test_numbers_that_are_none(self) -> None:
        given = (self.BOXES, torch.tensor([0.9, float("nan"), 0.1]), self.WANTED[2])
        assert differences(self.WANTED, given, self.SIZE) == Exported(float("inf"), float("inf"))
