"""Pictures of a detector's answers."""

import copy
import csv
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from typer.testing import CliRunner

from jobs.cli import app
from jobs.predict import predict
from pipeline.data.labels import Category, LabelMap
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.predict.detector import Detector
from pipeline.predict.draw import category_color, draw_boxes, draw_pictures
from pipeline.predict.pictures import Picture, find_pictures
from tests.builders import make_image, write_checkpoint, write_coco, write_image

LABELS = LabelMap("coco91", (Category(1, "cat"), Category(3, "dog"), Category(90, "toothbrush")))


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    return Detector.from_checkpoint(write_checkpoint(tmp_path_factory.mktemp("run"), LABELS))


class TestBoxes:
    def test_box_is_where_it_belongs(self) -> None:
        drawn = np.array(draw_boxes(make_image(200, 100), [{"bbox": [20, 40, 60, 30], "category_id": 7}], {7: "cup"}))
        for x, y in ((20, 60), (80, 60), (50, 40), (50, 70)):
            assert tuple(drawn[y, x]) == category_color(7)
        assert (drawn[50:65, 30:75] == make_image(200, 100)[50:65, 30:75]).all()

    def test_colors_differ(self) -> None:
        assert len({category_color(category_id) for category_id in range(1, 91)}) > 80


def found_in(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The images and the detections of a folder of drawn pictures."""
    return read_json(out / "images.json", "images")["images"], read_json(out / "detections.json", "detections")


class TestDrawPictures:
    @pytest.mark.parametrize("batch_size", [1, 2])
    def test_pictures_and_detections(self, batch_size: int, detector: Detector, tmp_path: Path) -> None:
        sizes = {"in/a.jpg": (40, 30), "in/b.png": (40, 30), "a.png": (20, 20)}
        paths = [write_image(tmp_path / name, *size) for name, size in sizes.items()]
        out = tmp_path / "out"
        pictures = find_pictures([str(path) for path in paths])
        drawn = draw_pictures(detector, pictures, out, score_threshold=0.0, batch_size=batch_size)
        assert {path.name for path in out.iterdir()} == {"a.png", "a_.png", "b.png", "images.json", "detections.json"}
        images, detections = found_in(out)
        assert [Path(image["file_name"]) for image in images] == paths
        assert [image["drawn"] for image in images] == ["a.png", "b.png", "a_.png"]
        assert [(image["width"], image["height"]) for image in images] == list(sizes.values())
        assert Image.open(out / "a.png").size == (40, 30)
        assert drawn.best == max(entry["score"] for entry in detections)
        for number, path in enumerate(paths, start=1):
            wanted = detector(path.read_bytes())
            own = [entry for entry in detections if entry["image_id"] == number]
            assert [entry["category_id"] for entry in own] == [entry["category_id"] for entry in wanted]
            assert [entry["score"] for entry in own] == pytest.approx([entry["score"] for entry in wanted], abs=1e-5)

    def test_they_are_results_of_coco(self, detector: Detector, tmp_path: Path) -> None:
        """With the ids of the COCO file, in the pictures, and as pycocotools takes them."""
        files, out, wide = write_coco(tmp_path, (4, 2)), tmp_path / "out", copy.deepcopy(detector)
        for head in wide.model.bbox_embed:  # type: ignore[union-attr]
            torch.nn.init.constant_(head.layers[-1].bias, 3.0)  # type: ignore[union-attr, index, arg-type]
        draw_pictures(wide, find_pictures([str(files.annotations)], files.images), out, score_threshold=0.0)
        images, detections = found_in(out)
        assert [image["id"] for image in images] == [4, 2]
        sizes = {image["id"]: (image["width"], image["height"]) for image in images}
        for entry in detections:
            (left, top, width, height), (right, bottom) = entry["bbox"], sizes[entry["image_id"]]
            assert min(left, top) >= 0
            assert (left + width <= right, top + height <= bottom) == (True, True)
        assert any(entry["bbox"][0] + entry["bbox"][2] == sizes[entry["image_id"]][0] for entry in detections)
        loaded = COCO(str(files.annotations)).loadRes(str(out / "detections.json"))
        assert len(loaded.getAnnIds()) == len(detections)

    def test_a_table(self, detector: Detector, tmp_path: Path) -> None:
        paths = [str(write_image(tmp_path / name)) for name in ("a,b.png", "c.png")]
        table, out = tmp_path / "found.csv", tmp_path / "out"
        drawn = draw_pictures(detector, find_pictures(paths), out, score_threshold=0.0, table=table)
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == drawn.detections > 2
        for row, entry in zip(rows, found_in(out)[1], strict=True):
            box = [float(row[key]) for key in ("left", "top", "width", "height")]
            assert (row["file_name"], row["category"]) == (paths[entry["image_id"] - 1], entry["category"])
            assert (box, float(row["score"])) == (entry["bbox"], entry["score"])
            assert [int(row[key]) for key in ("image_id", "category_id")] == [entry["image_id"], entry["category_id"]]

    def test_attention(self, detector: Detector, tmp_path: Path) -> None:
        pictures, out = find_pictures([str(write_image(tmp_path / "a.png", 40, 30))]), tmp_path / "out"
        draw_pictures(detector, pictures, out, score_threshold=1.0, show_attention=2)
        ((best,), _) = found_in(out)
        assert len(best["attention"]) == 2
        draw_pictures(detector, pictures, out, score_threshold=0.4, show_attention=1, queries=[5])
        ((chosen,), _) = found_in(out)
        assert chosen["attention"] == ["a_query5.png"]
        drawn = {*best["attention"], "a_query5.png", "a.png", "images.json", "detections.json"}
        assert {path.name for path in out.iterdir()} == drawn

    def test_a_full_disk(self, detector: Detector, tmp_path: Path) -> None:
        image = write_image(tmp_path / "a.png")
        out = tmp_path / "out"
        out.mkdir()
        (out / "a.png").symlink_to("/dev/full")
        with pytest.raises(UserError, match=r"out: no space left .* --out"):
            draw_pictures(detector, find_pictures([str(image)]), out, score_threshold=0.0)
        assert not (out / "detections.json").exists()

    @pytest.mark.parametrize("name", ["a.png", "images.json", "found.csv"])
    def test_a_folder_in_the_way(self, name: str, detector: Detector, tmp_path: Path) -> None:
        pictures, out = find_pictures([str(write_image(tmp_path / "a.png"))]), tmp_path / "out"
        (out / name).mkdir(parents=True)
        with pytest.raises(UserError, match=rf"out/{re.escape(name)}: cannot be written \(Is a directory\); set --"):
            draw_pictures(detector, pictures, out, score_threshold=0.0, table=out / "found.csv")

    @pytest.mark.parametrize("letter", ["a", "日"])
    def test_long_names(self, letter: str, detector: Detector, tmp_path: Path) -> None:
        name = letter * (251 // len(letter.encode())) + ".png"
        pictures = find_pictures([str(write_image(tmp_path / folder / name)) for folder in ("1", "2")])
        draw_pictures(detector, pictures, tmp_path / "out", score_threshold=0.0, show_attention=1)
        for image in found_in(tmp_path / "out")[0]:
            for drawn in (image["drawn"], *image["attention"]):
                assert (tmp_path / "out" / drawn).is_file()

    def test_a_name_that_is_no_text(self, detector: Detector, tmp_path: Path) -> None:
        pictures = find_pictures([str(write_image(tmp_path / os.fsdecode(b"\xff.png")))])
        draw_pictures(detector, pictures, tmp_path / "out", score_threshold=0.0, table=tmp_path / "found.csv")
        assert r"/\udcff.png,1," in (tmp_path / "found.csv").read_text(encoding="utf-8")

    def test_an_interruption_does_not_wait_for_a_server(
        self, detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answers = threading.Event()

        def hang() -> bytes:
            assert answers.wait(60)
            return b""

        def interrupt(_: object) -> None:
            raise KeyboardInterrupt

        pictures = find_pictures([str(write_image(tmp_path / name)) for name in ("a.png", "b.png")])
        pictures.append(Picture("c.png", hang, 3))
        monkeypatch.setattr(detector, "detect_in", interrupt)
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            draw_pictures(detector, pictures, tmp_path / "out", score_threshold=0.0)
        answers.set()
        assert time.monotonic() - began < 30

    def test_not_a_picture(self, detector: Detector, tmp_path: Path) -> None:
        (tmp_path / "text.jpg").write_text("text")
        with pytest.raises(UserError, match=r"text\.jpg: these bytes are not a picture"):
            draw_pictures(detector, find_pictures([str(tmp_path / "text.jpg")]), tmp_path / "out", score_threshold=0.4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    categories = (Category(1, "[/]"), Category(3, "$\\frac$"), Category(9, "a\x1b[31m\nb"))
    return write_checkpoint(tmp_path_factory.mktemp("run"), LabelMap("contiguous", categories))


def test_one_bad_picture_of_three(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.jpg", "c.png"):
        write_image(tmp_path / "in" / name)
    (tmp_path / "in" / "b.jpg").write_text("text")
    os.mkfifo(tmp_path / "in" / "d.jpg")
    out = tmp_path / "out"
    with caplog.at_level("WARNING", logger="raydetr"):
        drawn = predict(str(checkpoint), [str(tmp_path / "in")], out, tracking_uri="", score_threshold=0.0)
    assert drawn.pictures == 2
    assert [Path(text.split(":")[0]).name for text in drawn.unusable] == ["b.jpg", "d.jpg"]
    assert "b.jpg: these bytes are not a picture" in caplog.text
    assert {path.name for path in out.iterdir()} == {"a.png", "c.png", "images.json", "detections.json"}
    assert len(found_in(out)[0]) == 2


def test_the_command_ends_with_1_and_says_how_many(checkpoint: Path, tmp_path: Path) -> None:
    good, bad = write_image(tmp_path / "a.jpg"), tmp_path / "b.jpg"
    bad.write_text("text")
    command = ["predict", "-m", str(checkpoint), "--out", str(tmp_path / "out"), "--score-threshold", "1"]
    result = CliRunner().invoke(app, [*command, str(good), str(bad)])
    assert result.exit_code == 1
    assert re.search(r"1 pictures, 0 detections at 1, best 0\.\d\d, in .*/out, [\d.]+ images/s", result.output)
    assert "1 of 2 pictures cannot be used" in result.output
    assert CliRunner().invoke(app, [*command, str(good)]).exit_code == 0


def test_no_picture_that_can_be_used(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_text("text")
    with pytest.raises(UserError, match=r"a\.jpg: .*none of the 2 pictures can be used"):
        predict(str(checkpoint), [str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")], tmp_path / "out", tracking_uri="")


class TestOwnFolder:
    def test_is_refused(self, checkpoint: Path, tmp_path: Path) -> None:
        write_image(tmp_path / "a.png")
        with pytest.raises(UserError, match="is the folder of the pictures"):
            predict(str(checkpoint), [str(tmp_path)], tmp_path, tracking_uri="")

    @pytest.mark.parametrize("link", [None, "symbolic", "hard"])
    def test_no_given_picture_is_written_over(self, checkpoint: Path, tmp_path: Path, link: str | None) -> None:
        picture = write_image(tmp_path / "in" / "a.png")
        before = picture.read_bytes()
        out = tmp_path / "out" if link else tmp_path / "in"
        out.mkdir(exist_ok=True)
        if link:
            (out / "a.png").symlink_to(picture) if link == "symbolic" else (out / "a.png").hardlink_to(picture)
        predict(str(checkpoint), [str(picture)], out, tracking_uri="", score_threshold=0.0)
        assert picture.read_bytes() == before
        assert found_in(out)[0][0]["drawn"] == "a_.png"

    def test_drawn_looks_take_no_name_of_another(self, checkpoint: Path, tmp_path: Path) -> None:
        pictures = [str(write_image(tmp_path / name)) for name in ("a_query5.png", "a.png")]
        predict(str(checkpoint), pictures, tmp_path / "out", tracking_uri="", show_attention=1, queries=[5])
        names = [name for entry in found_in(tmp_path / "out")[0] for name in (entry["drawn"], *entry["attention"])]
        assert len(set(names)) == len(names) == 4
