"""The plot of a sweep."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from pipeline.evaluate.parallel import axis_places, plot_parallel


@pytest.mark.parametrize(
    ("values", "places", "texts"),
    [
        pytest.param([1, 3, 2], [0, 1, 0.5], ["1", "3", "2"], id="numbers"),
        pytest.param([1e-4, 1e-2, 1e-3], [0, 1, 0.5], ["0.0001", "0.01", "0.001"], id="rates"),
        pytest.param([0.0, 100.0, 50.0], [0, 1, 0.5], ["0", "100", "50"], id="zero"),
        pytest.param(["b", None, [6.0]], [0, 0.5, 1], ["b", "None", "[6.0]"], id="other things"),
        pytest.param([True, False, True], [0, 1, 0], ["True", "False", "True"], id="switches"),
        pytest.param([7, 7], [0.5, 0.5], ["7", "7"], id="one value"),
        pytest.param([], [], [], id="none"),
    ],
)
def test_places_on_an_axis(values: list[Any], places: list[float], texts: list[str]) -> None:
    found, marks = axis_places(values)
    assert found == pytest.approx(places)
    assert [marks[place] for place in found] == texts


def test_scores_stand_by_their_size() -> None:
    assert axis_places([0.01, 0.5, 0.25], may_be_log=False)[0] == pytest.approx([0, 1, 0.24 / 0.49])


def test_the_plot_has_the_trials_that_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[float]] = []

    class Watched(Figure):
        def savefig(self, *arguments: Any, **more: Any) -> None:
            drawn.extend([*map(float, line.get_ydata())] for line in self.axes[0].lines if len(line.get_xdata()) == 3)
            super().savefig(*arguments, **more)

    monkeypatch.setattr("matplotlib.figure.Figure", Watched)
    rows = [
        {"train.lr": 1e-3, "model.two_stage": "$mixed$", "AP": 0.5},
        {"train.lr": 1e-4, "model.two_stage": True, "AP": 0.1},
        {"train.lr": 1e-5, "model.two_stage": True, "AP": None},
    ]
    path = plot_parallel(rows, ["train.lr", "model.two_stage"], "AP", tmp_path / "new" / "plot.png")
    assert drawn == [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    with Image.open(path) as image:
        assert image.width > image.height > 300
