"""Pictures, tables and plots of an evaluation."""

import csv
from pathlib import Path
from typing import Any

import matplotlib.axes
import numpy as np
import pytest
from PIL import Image

from jobs.console import make_console
from pipeline.config.sections import METRICS, ShardsSection
from pipeline.data.manifest import Manifest
from pipeline.evaluate.report import (
    COLUMNS,
    choose_samples,
    metrics_table,
    plot_categories,
    write_category_table,
    write_pictures,
)
from pipeline.predict.attention import Look, draw_look
from pipeline.predict.draw import draw_boxes
from pipeline.shard.coco import open_source
from pipeline.shard.write import shard_split
from tests.builders import make_annotation, make_dataset_section, make_image, make_manifest, write_coco, write_image


def make_metrics(**categories: float) -> dict[str, object]:
    """Metrics in which each category has one value everywhere."""
    per_category = {name: dict.fromkeys(METRICS, value) for name, value in categories.items()}
    return {**dict.fromkeys(METRICS, 0.25), "per_category": per_category}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    crowd = make_annotation(2, 1, (5, 5, 20, 10), 3, iscrowd=1)
    return make_manifest(tmp_path_factory.mktemp("split"), range(1, 7), [make_annotation(1, 1), crowd])


class TestPictures:
    def test_the_same_every_time(self, split: Manifest, tmp_path: Path) -> None:
        detections = [{"image_id": 1, "category_id": 3, "bbox": [-4.0, 2, 12, 30], "score": 0.9}]
        first = write_pictures(split, detections, tmp_path / "a", 3, 0.4)
        second = write_pictures(split, detections, tmp_path / "b", 3, 0.4)
        assert [path.name for path in first] == ["000000000001.png", "000000000003.png", "000000000005.png"]
        assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
        assert Image.open(first[0]).size == (2 * 400 + 8, 300 + 26)

    def test_detections_left_truth_right(self, split: Manifest, tmp_path: Path) -> None:
        detections = [{"image_id": 1, "category_id": 3, "bbox": [2, 10, 12, 8], "score": 0.9}]
        other = {"image_id": 2, "category_id": 3, "bbox": [8, 2, 12, 8], "score": 0.99}
        with_one = np.array(Image.open(write_pictures(split, detections, tmp_path / "a", 1, 0.4)[0]))
        none = np.array(Image.open(write_pictures(split, [*detections, other], tmp_path / "b", 1, 0.95)[0]))
        empty = np.array(Image.open(write_pictures(split, [], tmp_path / "c", 1, 0.4)[0]))
        assert (none == empty).all()
        assert (with_one[:, :400] != none[:, :400]).any()
        assert (with_one[:, 400:] == none[:, 400:]).all()

    def test_detections_of_a_smaller_copy_are_where_its_original_has_them(self, tmp_path: Path) -> None:
        box = (40, 20, 100, 60)
        files = write_coco(tmp_path, [{"id": 1, "width": 200, "height": 100}], [make_annotation(1, 1, box)])
        shards = ShardsSection(max_side=50)
        manifest = shard_split(open_source(*files), "val", tmp_path / "out", make_dataset_section(tmp_path), shards)
        found = [{"image_id": 1, "category_id": 1, "bbox": list(box), "score": 1.0}]
        (path,) = write_pictures(manifest, found, tmp_path / "pictures", 1, 0.4)
        picture = np.array(Image.open(path)).astype(int)
        left, right = picture[26 + 60 :, :400], picture[26 + 60 :, 408:]  # without the names above the boxes
        np.testing.assert_array_equal(left, right)
        (path,) = write_pictures(manifest, [], tmp_path / "none", 1, 0.4)
        assert (np.array(Image.open(path))[26 + 60 :, :400] != left).any()

    def test_more_pictures_than_images(self, split: Manifest) -> None:
        assert len(choose_samples(split, 50)) == 6
        assert choose_samples(split, 0) == []


def test_category_table(tmp_path: Path) -> None:
    rows = list(csv.reader(write_category_table(make_metrics(cat=0.5, cow=-1), tmp_path / "a.csv").open()))
    assert rows[0][:3] == ["category", "AP", "AP50"]
    assert rows[1][:2] == ["cat", "0.5"]
    assert rows[2][:2] == ["cow", ""]


@pytest.mark.parametrize("count", [0, 1, 80])
def test_plot(count: int, tmp_path: Path) -> None:
    metrics = make_metrics(**{f"kind {number}": number / 100 for number in range(count)}, none=-1.0)
    with Image.open(plot_categories(metrics, tmp_path / "plot.png")) as image:
        assert image.height < 1800


def test_metrics_table() -> None:
    text = metrics_table(make_metrics(cat=0.5, cow=-1))
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    assert lines["cat"][0] == "0.5000"
    assert lines["cow"][0] == "-"
    assert lines["all"][0] == "0.2500"


NAMES = ["[/]", "[stop]", "[red]x", "$\\frac$", "$", "a\x1b[31m\nb", "w/", "x" * 250]


def metrics_of(names: list[str]) -> dict[str, Any]:
    values = dict.fromkeys(COLUMNS, 0.5)
    return {**values, "per_category": {name: values for name in names}}


def test_tables() -> None:
    table = metrics_table(metrics_of(NAMES))
    for name in ("[/]", "[stop]", "[red]x", "$\\frac$", "a\\x1b[31m\\nb"):
        assert name in table
    assert "\x1b" not in table


def test_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    original = matplotlib.axes.Axes.set_yticks

    def keep(self: Any, ticks: Any, labels: Any, **more: Any) -> Any:
        drawn.extend(labels)
        return original(self, ticks, labels, **more)

    monkeypatch.setattr(matplotlib.axes.Axes, "set_yticks", keep)
    assert plot_categories(metrics_of(NAMES), tmp_path / "a.png").is_file()
    assert "$\\frac$" in drawn
    assert max(len(label) for label in drawn) < 80


@pytest.mark.parametrize("name", NAMES)
def test_pictures(name: str, tmp_path: Path) -> None:
    entries = [{"bbox": [2, 3, 10, 8], "category_id": 1, "score": 0.5}]
    assert draw_boxes(make_image(), entries, {1: name}, 100).size[0] == 100
    points = np.zeros((2, 1, 2, 2), dtype=np.float32)
    weights = np.full((2, 1, 2), 0.25, dtype=np.float32)
    seen = Look(3, name, 0.5, (2, 3, 9, 9), np.zeros(2, dtype=np.float32), points, weights, (32, 24), ((8, 3, 4),))
    draw_look(make_image(), seen).savefig(tmp_path / "a.png")


def test_the_console_prints_markup(capsys: pytest.CaptureFixture[str]) -> None:
    make_console().print("run          /data/[old]/[/]")
    assert "/data/[old]/[/]" in capsys.readouterr().out


def test_a_damaged_picture_is_not_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_image(tmp_path / "train" / "000000000002.jpg", 32, 24)
    path = tmp_path / "train" / "000000000002.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 4 // 5] + b"\xff\xd9")
    manifest = make_manifest(tmp_path, annotations=[make_annotation(1, 1)])
    paths = write_pictures(manifest, [], tmp_path / "out", 3, 0.5)
    assert [path.name for path in paths] == ["000000000001.png", "000000000003.png"]
    assert "not drawn" in caplog.text
    assert Image.open(paths[0]).width > 400
