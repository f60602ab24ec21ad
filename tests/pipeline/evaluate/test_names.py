"""Names of categories in tables and plots: printed as they are written, whatever rich and matplotlib make of them."""

from pathlib import Path
from typing import Any

import matplotlib.axes
import numpy as np
import pytest
from PIL import Image

from jobs.console import make_console
from pipeline.evaluate.report import COLUMNS, metrics_table, plot_categories, write_pictures
from pipeline.predict.attention import Look, draw_look
from pipeline.predict.draw import draw_boxes
from tests.builders import make_annotation, make_image, make_manifest, write_image

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
