"""The detector from a checkpoint and from its own folder."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model import DetrConfig, ImageBatch
from pipeline.config.sections import EvaluateSection
from pipeline.data.labels import Category, LabelMap
from pipeline.errors import UserError
from pipeline.evaluate.detect import detect
from pipeline.predict.detector import Detector, detector_in, read_picture
from tests.builders import make_image, make_manifest, write_checkpoint, write_image

LABELS = LabelMap("coco91", (Category(1, "cat"), Category(3, "dog"), Category(90, "toothbrush")))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run"), LABELS)


class OneBox(torch.nn.Module):
    """A network that finds a dog in the middle of every picture, and in second place what is no category."""

    def forward(self, batch: ImageBatch) -> dict[str, torch.Tensor]:
        logits = torch.full((len(batch.pixels), 1, LABELS.num_classes), -20.0)
        logits[..., 3], logits[..., 12] = 2.0, 1.0
        return {"pred_logits": logits, "pred_boxes": torch.tensor([[[0.5, 0.5, 0.5, 0.25]]])}


class TestDetector:
    def test_box_is_xywh_in_pixels_of_the_picture(self) -> None:
        section = EvaluateSection(short_side=40, max_side=60, max_detections=2)
        detector = Detector(OneBox(), DetrConfig(num_classes=LABELS.num_classes), LABELS, section)
        (detection,) = detector(make_image(200, 80))
        assert detection["bbox"] == pytest.approx([50, 30, 100, 20])
        assert (detection["category_id"], detection["category"]) == (3, "dog")
        assert detection["score"] == pytest.approx(0.8808, abs=1e-4)

    def test_from_checkpoint_takes_the_training_sizes(self, checkpoint: Path) -> None:
        detector = Detector.from_checkpoint(checkpoint)
        assert (detector.evaluate.short_side, detector.evaluate.max_side) == (64, 96)

    def test_saved_and_loaded(self, checkpoint: Path, tmp_path: Path) -> None:
        detector = Detector.from_checkpoint(checkpoint, EvaluateSection(short_side=40, max_side=60, max_detections=20))
        detector.save(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "detector.json"}
        loaded = Detector.load(tmp_path)
        assert loaded(make_image(50, 40)) == detector(make_image(50, 40))
        assert (loaded.config, loaded.labels, loaded.evaluate) == (detector.config, detector.labels, detector.evaluate)

    def test_only_categories_come_out(self, checkpoint: Path) -> None:
        detections = Detector.from_checkpoint(checkpoint, EvaluateSection(short_side=40, max_side=60))(make_image())
        assert {(d["category_id"], d["category"]) for d in detections} <= {(1, "cat"), (3, "dog"), (90, "toothbrush")}
        scores = [d["score"] for d in detections]
        assert scores == sorted(scores, reverse=True)

    def test_threshold(self, checkpoint: Path) -> None:
        detector = Detector.from_checkpoint(checkpoint)
        everything = detector(make_image())
        middle = everything[len(everything) // 2]["score"]
        assert detector(make_image(), middle) == [d for d in everything if d["score"] >= middle]

    def test_equals_the_evaluation(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path, [{"id": 7, "width": 50, "height": 40, "file_name": "a.png"}])
        section = EvaluateSection(batch_size=1, short_side=48, max_side=64)
        checkpoint = write_checkpoint(tmp_path, manifest.labels)
        served = Detector.from_checkpoint(checkpoint, section)((tmp_path / "train" / "a.png").read_bytes())
        scored = detect(checkpoint, manifest, [[0]], section, "cpu")
        assert [(d["category_id"], d["bbox"], d["score"]) for d in served] == [
            (d["category_id"], d["bbox"], d["score"]) for d in scored
        ]

    def test_opened_with_other_sizes(self, checkpoint: Path, tmp_path: Path) -> None:
        section = EvaluateSection(short_side=40, max_side=60, max_detections=7)
        Detector.from_checkpoint(checkpoint).save(tmp_path)
        for folder in (checkpoint, tmp_path):
            detector = detector_in(folder, section)
            assert detector.evaluate == section

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param(lambda s: s.pop("model"), "lacks 'model'", id="no model"),
            pytest.param(lambda s: s.pop("labels"), "lacks 'labels'", id="no labels"),
            pytest.param(lambda s: s["model"].update(wings=2), "wings", id="unknown setting"),
            pytest.param(lambda s: s["model"].update(heads=5), "heads", id="impossible setting"),
            pytest.param(lambda s: s["model"].update(num_queries=9), r"query_embed.weight is \[8, 64\]", id="other"),
        ],
    )
    def test_broken_settings(self, change: Any, message: str, checkpoint: Path, tmp_path: Path) -> None:
        Detector.from_checkpoint(checkpoint).save(tmp_path)
        settings = json.loads((tmp_path / "detector.json").read_text())
        change(settings)
        (tmp_path / "detector.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match=f"{tmp_path}.*{message}") as caught:
            Detector.load(tmp_path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "content", [None, "{", "[1]", '{"format": 99}'], ids=["missing", "not JSON", "no object", "other format"]
    )
    def test_broken_folder(self, content: str | None, checkpoint: Path, tmp_path: Path) -> None:
        Detector.from_checkpoint(checkpoint).save(tmp_path)
        (tmp_path / "detector.json").unlink()
        if content is not None:
            (tmp_path / "detector.json").write_text(content)
        with pytest.raises(UserError, match=str(tmp_path)):
            Detector.load(tmp_path)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


class TestReadPicture:
    @pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
    def test_modes(self, mode: str, tmp_path: Path) -> None:
        path = write_image(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), 30, 20, mode=mode)
        assert read_picture(path.read_bytes()).shape == (20, 30, 3)

    @pytest.mark.parametrize(("orientation", "shape"), [(1, (20, 30, 3)), (3, (20, 30, 3)), (6, (30, 20, 3))])
    def test_turned_as_a_viewer_shows_it(self, orientation: int, shape: tuple[int, ...], tmp_path: Path) -> None:
        path = write_image(tmp_path / "a.png", 30, 20, orientation=orientation)
        turned = read_picture(path.read_bytes())
        assert turned.shape == shape
        if orientation == 3:
            assert np.array_equal(turned, make_image(30, 20)[::-1, ::-1])

    def test_other_formats(self) -> None:
        assert np.array_equal(read_picture(encoded(make_image(), "BMP")), make_image())

    @pytest.mark.parametrize("content", [b"", b"no picture", None], ids=["empty", "text", "cut off"])
    def test_not_a_picture(self, content: bytes | None) -> None:
        with pytest.raises(UserError, match="picture"):
            read_picture(encoded(make_image(200, 200))[:300] if content is None else content)
