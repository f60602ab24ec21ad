"""Pictures of what a detection looked at: the points that its query samples, after arXiv 2010.04159, figure 6.

Matplotlib is imported by the first picture, not by this module: a driver that only trains does without.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.deformable_detr import DeformableDetr
from model.sampling import Sampling, record_sampling
from pipeline.errors import UserError, shown
from pipeline.predict.detector import Detector

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure

MOST_NAME = 60
"""Characters of a category's name that are drawn."""

MOST_SIDE = 1200
"""Larger pictures are made this many pixels long before they are drawn in panels."""
PANEL = 4.2
"""Longest side of a panel's picture, in inches."""
DPI = 110
LEAST_WINDOW = 0.15
"""Least part of the picture's sides that the panel of a level shows."""
GREEN = "#00e000"


@dataclass(frozen=True)
class Look:
    """What the last decoder layer sampled for a query. Coordinates are (x, y) pixels of the picture."""

    query: int
    """Number of the query, from 0."""
    category: str
    """Name of its best category."""
    score: float
    """Score of that."""
    box: tuple[float, float, float, float]
    """Its box: left, top, right, bottom; not clipped."""
    reference: NDArray[np.float32]
    """[2], the reference point, or the centre of the reference box."""
    points: NDArray[np.float32]
    """[heads, levels, points, 2]; not clipped: those outside the picture sample zeros."""
    weights: NDArray[np.float32]
    """[heads, levels, points]; those of a head add up to 1."""
    size: tuple[int, int]
    """Width and height of the picture."""
    levels: tuple[tuple[int, int, int], ...]
    """Stride in pixels of the network's input, height and width in cells, of each level."""


def look(detector: Detector, pixels: NDArray[np.uint8], queries: Sequence[int] = (), top: int = 1) -> list[Look]:
    """Detect in a picture and keep what queries sampled.

    Args:
        detector: a Deformable DETR.
        pixels: RGB uint8 [height, width, 3].
        queries: numbers of the queries that are wanted.
        top: without `queries`, how many: those with the best scores, each once.

    Raises:
        UserError: the detector has no sampling points, or there is no such query.
    """
    check_samples(detector)
    batch, sizes = detector.prepare([pixels])
    with record_sampling(detector.model.transformer.decoder.layers[-1].cross_attn) as calls:  # type: ignore[union-attr, index]
        every = detector.config.num_queries * detector.config.num_logits
        (result,) = detector.results(batch, sizes, every)
    (sampling,) = calls
    best: dict[int, tuple[str, float, list[float]]] = {}
    columns = (result[name].tolist() for name in ("queries", "labels", "scores", "boxes"))
    for query, label, score, box in zip(*columns, strict=True):  # best first
        category = detector.labels.category(label)
        if category is not None:
            best.setdefault(query, (detector.labels.names[category], score, box))
    for query in queries:
        if query not in best:
            raise UserError(f"query {query}: no detection is of a query of this number; there are 0 to {max(best)}")
    height, width = pixels.shape[:2]
    strides = detector.config.strides
    return [_look(query, best[query], sampling, strides, (width, height)) for query in queries or list(best)[:top]]


def check_samples(detector: Detector) -> None:
    """Refuse a network without sampling points.

    Raises:
        UserError: it is a DETR.
    """
    if not isinstance(detector.model, DeformableDetr):
        raise UserError(
            "the attention of this model has no sampling points to show: it is a DETR, which attends to every cell; "
            "take a model of model.arch deformable_detr"
        )


def _look(
    query: int,
    detection: tuple[str, float, list[float]],
    sampling: Sampling,
    strides: Sequence[int],
    size: tuple[int, int],
) -> Look:
    category, score, (left, top, right, bottom) = detection
    scale = np.array(size, dtype=np.float32)
    return Look(
        query,
        category,
        score,
        (left, top, right, bottom),
        sampling.reference[0, query].float().cpu().numpy() * scale,
        sampling.points[0, query].float().cpu().numpy() * scale,
        sampling.weights[0, query].float().cpu().numpy(),
        size,
        tuple((stride, *shape) for stride, shape in zip(strides, sampling.shapes, strict=True)),
    )


def save_look(pixels: NDArray[np.uint8], seen: Look, path: Path) -> Path:
    """Write what `draw_look` draws as PNG."""
    draw_look(pixels, seen).savefig(path, dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    return path


def draw_look(pixels: NDArray[np.uint8], seen: Look) -> "Figure":
    """Draw the whole picture with all points, then for each level the part of the picture that was looked at.

    Points are circles, colored by their weights; the box is green, and so is the cross at the reference point.

    Args:
        pixels: RGB uint8 [height, width, 3].
        seen: what `look` gives for this picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    height, width = pixels.shape[:2]
    picture = Image.fromarray(pixels)
    picture.thumbnail((MOST_SIDE, MOST_SIDE))
    levels = range(len(seen.levels))
    panels = 1 + len(levels)
    columns = panels if height > width else max(2, math.ceil(panels / 2))  # tall pictures stand in one row
    rows = math.ceil(panels / columns)
    panel_width, panel_height = (PANEL * side / max(width, height) for side in (width, height))
    figure = Figure((columns * panel_width + 1, rows * (panel_height + 0.5) + 0.5), layout="compressed")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    whole, *parts = grid.flat
    dots = _draw_panel(whole, picture, seen, levels, (0, 0, width, height))
    left, top, right, bottom = window = _window(seen)
    whole.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color="white", linestyle="--"))
    title = f"query {seen.query}: {shown(seen.category, MOST_NAME)} {seen.score:.2f}"
    whole.set_title(title, fontsize=10, parse_math=False)
    for level, axes in zip(levels, parts, strict=False):
        _draw_panel(axes, picture, seen, [level], window)
        stride, cells_y, cells_x = seen.levels[level]
        part = float(seen.weights[:, level].sum() / seen.weights.sum())
        axes.set_title(f"stride {stride}, {cells_x} x {cells_y} cells\n{part:.0%} of the weight", fontsize=10)
    figure.colorbar(dots, ax=grid, shrink=0.8, aspect=30, label="attention weight (a head's add up to 1)")
    return figure


def _draw_panel(
    axes: "Axes", picture: Image.Image, seen: Look, levels: Sequence[int], window: tuple[float, float, float, float]
) -> "PathCollection":
    """Draw picture, points of some levels, reference point and box; `window` is the part of the picture to show."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    width, height = seen.size
    left, top, right, bottom = window
    axes.imshow(picture, extent=(0, width, height, 0))
    axes.set(xlim=(left, right), ylim=(bottom, top))
    points, weights = seen.points[:, levels].reshape(-1, 2), seen.weights[:, levels].ravel()
    order = weights.argsort()  # the greatest weight on top
    dots = axes.scatter(
        points[order, 0], points[order, 1], c=weights[order], vmin=0, vmax=float(seen.weights.max()), cmap="turbo",
        s=30 if len(levels) == 1 else 14, edgecolors="black", linewidths=0.6,
        path_effects=[withStroke(linewidth=2, foreground="white")],
    )  # fmt: skip
    x, y, x_end, y_end = seen.box
    axes.add_patch(Rectangle((x, y), x_end - x, y_end - y, fill=False, color=GREEN, linewidth=1.8))
    axes.scatter(seen.reference[0], seen.reference[1], c=GREEN, marker="+", s=160, linewidths=2.2, zorder=3)
    return dots


def _window(seen: Look) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the part of the picture, in its proportions, that holds the box and all points."""
    size = np.array(seen.size, dtype=np.float32)
    held = np.concatenate([seen.points.reshape(-1, 2), np.reshape(seen.box, (2, 2)), seen.reference[None]])
    held = held.clip(0, size)
    first, last = held.min(0), held.max(0)
    side = size * min(1.0, max(LEAST_WINDOW, float(((last - first) / size).max()) * 1.15))
    left, top = ((first + last - side) / 2).clip(0, size - side).tolist()
    return left, top, left + float(side[0]), top + float(side[1])
