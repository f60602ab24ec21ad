"""Parallel coordinates: the trials of a sweep as lines through their settings, to what they came to."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import printable

MOST_TEXT = 24
"""Most characters of a value beside an axis."""
LOG_RATIO = 20
"""An axis of positive numbers that are so many times apart is logarithmic."""
LEAST_GAP = 0.03
"""Part of an axis by which two values are apart that are both written."""


def plot_parallel(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], metric: str, path: Path) -> Path:
    """Plot one line a trial: an axis for each key, then the metric, by which the lines are coloured.

    Args:
        rows: the values of each trial by key, the best first; those without the metric are left out.
        keys: the settings.
        metric: what the trials came to, 0 to 1.
        path: PNG file to write.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [row for row in reversed(rows) if row[metric] is not None]  # the best is drawn over the others
    figure = Figure(figsize=(2.2 * (len(keys) + 1) + 1.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    columns = [axis_places([row[key] for row in lines]) for key in keys]
    columns.append(axis_places([row[metric] for row in lines], may_be_log=False))
    for number in range(len(lines)):
        is_best = number == len(lines) - 1
        color = colormaps["viridis_r"](columns[-1][0][number])
        axes.plot([places[number] for places, _ in columns], color=color, linewidth=3 if is_best else 1.5, alpha=0.9)
    for number, (_, marks) in enumerate(columns):
        axes.axvline(number, color="#666666", linewidth=1)
        written: list[float] = []
        for place, text in reversed(marks.items()):  # the best first
            if any(abs(place - other) < LEAST_GAP for other in written):
                continue
            written.append(place)
            axes.annotate(
                printable(text)[:MOST_TEXT], (number, place), (4, 2), textcoords="offset points", fontsize=8,
                parse_math=False, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            )  # fmt: skip
    axes.set_xticks(range(len(columns)), [*keys, metric], parse_math=False)
    axes.set_xlim(-0.2, len(columns) - 0.4)
    axes.set_yticks([])
    for side in ("top", "left", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title(f"{len(lines)} trials, the best {metric} {lines[-1][metric]:.4f}" if lines else "no trial is done")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def axis_places(values: Sequence[Any], *, may_be_log: bool = True) -> tuple[list[float], dict[float, str]]:
    """Where values stand on an axis from 0 to 1, and what is written beside it.

    Numbers stand by their size or, where they may, its logarithm; anything else in the order in which it comes.
    """
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        is_log = may_be_log and bool(values) and min(values) > 0 and max(values) >= LOG_RATIO * min(values)
        numbers = [math.log(value) if is_log else float(value) for value in values]
    else:
        order = {text: place for place, text in enumerate(dict.fromkeys(map(str, values)))}
        numbers = [float(order[str(value)]) for value in values]
    least, most = min(numbers, default=0.0), max(numbers, default=0.0)
    places = [(number - least) / (most - least) if most > least else 0.5 for number in numbers]
    texts = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
    return places, dict(zip(places, texts, strict=True))
