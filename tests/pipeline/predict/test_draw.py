"""Pictures of a detector's answers."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import app
from jobs.predict import predict
from pipeline.data.labels import Category, LabelMap
from pipeline.errors import UserError
from pipeline.predict.detector import Detector
from pipeline.predict.draw import category_color, draw_boxes, draw_pictures, find_pictures
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


class TestFindPictures:
    def test_files_and_the_pictures_of_folders(self, tmp_path: Path) -> None:
        inside = [write_image(tmp_path / "in" / name) for name in ("a.jpg", "b.png")]
        (tmp_path / "in" / "notes.txt").write_text("not a picture")
        beside = write_image(tmp_path / "a.png")
        assert find_pictures([tmp_path / "in", beside]) == [*inside, beside]

    def test_patterns(self, tmp_path: Path) -> None:
        paths = [write_image(tmp_path / name) for name in ("a.jpg", "deep/b.jpg", "deep/[c].png")]
        (tmp_path / "deep" / "notes.txt").write_text("not a picture")
        assert find_pictures([tmp_path / "*.jpg"]) == paths[:1]
        assert find_pictures([tmp_path / "**" / "*"]) == [paths[0], paths[2], paths[1]]
        assert find_pictures([paths[2]]) == [paths[2]]  # a name, not a pattern

    def test_the_images_of_a_coco_file(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, (4, 2))
        pictures = [files.images / f"{number:012d}.jpg" for number in (4, 2)]
        assert find_pictures([files.annotations], files.images) == pictures
        files.annotations.rename(files.images / "listed.json")
        assert find_pictures([files.images / "listed.json"]) == pictures

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            pytest.param("none.jpg", "none.jpg: no such picture", id="missing"),
            pytest.param("empty", "empty: no picture in this folder", id="empty folder"),
            pytest.param("*.png", r"\*\.png: no picture has a name of this pattern", id="pattern"),
            pytest.param("list.json", r"list\.json: no COCO file, which has a list `images`", id="another JSON"),
            pytest.param("text.json", r"text\.json: the COCO file is not JSON", id="no JSON"),
            pytest.param("nameless.json", r"nameless\.json: images\[1\] has no file_name", id="no name"),
        ],
    )
    def test_nothing_there(self, name: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "list.json").write_text("[1]")
        (tmp_path / "text.json").write_text("text")
        (tmp_path / "nameless.json").write_text('{"images": [{"file_name": "a.jpg"}, {"id": 2}]}')
        with pytest.raises(UserError, match=message):
            find_pictures([tmp_path / name])


class TestDrawPictures:
    def test_pictures_and_detections(self, detector: Detector, tmp_path: Path) -> None:
        paths = [
            write_image(tmp_path / "in" / "a.jpg", 40, 30),
            write_image(tmp_path / "in" / "b.png", 30, 40),
            write_image(tmp_path / "a.png", 20, 20),
        ]
        out = tmp_path / "out"
        draw_pictures(detector, paths, out, score_threshold=0.0)
        assert {path.name for path in out.iterdir()} == {"a.png", "a_.png", "b.png", "detections.json"}
        found = json.loads((out / "detections.json").read_text())
        assert [Path(entry["file_name"]) for entry in found] == paths
        assert [entry["drawn"] for entry in found] == ["a.png", "b.png", "a_.png"]
        assert found[0]["detections"][0].keys() == {"category_id", "category", "score", "bbox"}
        assert Image.open(out / "a.png").size == (40, 30)

    def test_a_table(self, detector: Detector, tmp_path: Path) -> None:
        paths = [write_image(tmp_path / name) for name in ("a,b.png", "c.png")]
        drawn = draw_pictures(detector, paths, tmp_path / "out", score_threshold=0.0, table=tmp_path / "found.csv")
        with (tmp_path / "found.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == drawn.detections > 2
        found = json.loads((tmp_path / "out" / "detections.json").read_text())
        wanted = [(entry["file_name"], each) for entry in found for each in entry["detections"]]
        for row, (name, each) in zip(rows, wanted, strict=True):
            box = [float(row[key]) for key in ("left", "top", "width", "height")]
            assert (row["file_name"], row["category"], box) == (name, each["category"], each["bbox"])
            assert (int(row["category_id"]), float(row["score"])) == (each["category_id"], each["score"])

    def test_attention(self, detector: Detector, tmp_path: Path) -> None:
        image, out = write_image(tmp_path / "a.png", 40, 30), tmp_path / "out"
        draw_pictures(detector, [image], out, score_threshold=1.0, show_attention=2)
        (best,) = json.loads((out / "detections.json").read_text())
        assert len(best["attention"]) == 2
        draw_pictures(detector, [image], out, score_threshold=0.4, show_attention=1, queries=[5])
        (chosen,) = json.loads((out / "detections.json").read_text())
        assert chosen["attention"] == ["a_query5.png"]
        drawn = {*best["attention"], "a_query5.png", "a.png", "detections.json"}
        assert {path.name for path in out.iterdir()} == drawn

    def test_not_a_picture(self, detector: Detector, tmp_path: Path) -> None:
        (tmp_path / "text.jpg").write_text("text")
        with pytest.raises(UserError, match=r"text\.jpg: these bytes are not a picture"):
            draw_pictures(detector, [tmp_path / "text.jpg"], tmp_path / "out", score_threshold=0.4)


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
        drawn = predict(str(checkpoint), [tmp_path / "in"], out, tracking_uri="", score_threshold=0.0)
    assert drawn.pictures == 2
    assert [Path(text.split(":")[0]).name for text in drawn.unusable] == ["b.jpg", "d.jpg"]
    assert "b.jpg: these bytes are not a picture" in caplog.text
    assert {path.name for path in out.iterdir()} == {"a.png", "c.png", "detections.json"}
    assert len(json.loads((out / "detections.json").read_text())) == 2


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
        predict(str(checkpoint), [tmp_path / "a.jpg", tmp_path / "b.jpg"], tmp_path / "out", tracking_uri="")


class TestOwnFolder:
    def test_is_refused(self, checkpoint: Path, tmp_path: Path) -> None:
        write_image(tmp_path / "a.png")
        with pytest.raises(UserError, match="is the folder of the pictures"):
            predict(str(checkpoint), [tmp_path], tmp_path, tracking_uri="")

    @pytest.mark.parametrize("link", [None, "symbolic", "hard"])
    def test_no_given_picture_is_written_over(self, checkpoint: Path, tmp_path: Path, link: str | None) -> None:
        picture = write_image(tmp_path / "in" / "a.png")
        before = picture.read_bytes()
        out = tmp_path / "out" if link else tmp_path / "in"
        out.mkdir(exist_ok=True)
        if link:
            (out / "a.png").symlink_to(picture) if link == "symbolic" else (out / "a.png").hardlink_to(picture)
        predict(str(checkpoint), [picture], out, tracking_uri="", score_threshold=0.0)
        assert picture.read_bytes() == before
        assert json.loads((out / "detections.json").read_text())[0]["drawn"] == "a_.png"

    def test_drawn_looks_take_no_name_of_another(self, checkpoint: Path, tmp_path: Path) -> None:
        pictures = [write_image(tmp_path / name) for name in ("a_query5.png", "a.png")]
        predict(str(checkpoint), pictures, tmp_path / "out", tracking_uri="", show_attention=1, queries=[5])
        found = json.loads((tmp_path / "out" / "detections.json").read_text())
        names = [name for entry in found for name in (entry["drawn"], *entry["attention"])]
        assert len(set(names)) == len(names) == 4
