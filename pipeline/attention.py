"""Pictures of what a detection looked at: the points that its query samples, after arXiv 2010.04159, figure 6."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from model.deformable_detr import DeformableDetr
from model.sampling import Sampling, record_sampling
from pipeline.errors import UserError
from pipeline.serving import Detector

MOST_SIDE = 1200
"""Larger pictures are made this many pixels long before they are drawn in panels."""
PANEL = 4.2
"""Longest side of a panel's picture, in inches."""
DPI = 110
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
    batch, sizes = detector.prepare(pixels)
    with record_sampling(detector.model.transformer.decoder.layers[-1].cross_attn) as calls:  # type: ignore[union-attr, arg-type, index]
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
        tuple((stride, *shape) for stride, shape in zip(strides, sampling.shapes, strict=True)),
    )


def draw_look(pixels: NDArray[np.uint8], seen: Look, path: Path) -> Path:
    """Draw a panel for all levels and one for each: the picture, points colored by weight, reference point and box.

    Args:
        pixels: RGB uint8 [height, width, 3].
        seen: what `look` gives for this picture.
        path: the PNG to write.
    """
    height, width = pixels.shape[:2]
    picture = Image.fromarray(pixels)
    picture.thumbnail((MOST_SIDE, MOST_SIDE))
    levels = len(seen.levels)
    panels = [list(range(levels)), *([level] for level in range(levels))] if levels > 1 else [[0]]
    columns = min(len(panels), 2 if width > height and len(panels) < 5 else 3)
    rows = math.ceil(len(panels) / columns)
    panel_width, panel_height = (PANEL * side / max(width, height) for side in (width, height))
    figure = Figure(figsize=(columns * panel_width + 1.2, rows * (panel_height + 0.45) + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    most = float(seen.weights.max())
    for axes, shown in zip(grid.flat, panels, strict=False):
        axes.imshow(picture, extent=(0, width, height, 0))
        dots = _draw_points(axes, seen, shown, most)
        axes.set_title(_title(seen, shown, width, height), fontsize=9)
        axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    bar = figure.colorbar(dots, ax=grid, shrink=0.8, aspect=30)
    bar.set_label("attention weight (a head's add up to 1)")
    figure.suptitle(f"query {seen.query}: {seen.category} {seen.score:.2f}; the cross is its reference point")
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def _draw_points(axes: Axes, seen: Look, shown: list[int], most: float) -> PathCollection:
    points, weights = seen.points[:, shown].reshape(-1, 2), seen.weights[:, shown].ravel()
    order = weights.argsort()  # the greatest weight on top
    dots = axes.scatter(
        *points[order].T, c=weights[order], vmin=0, vmax=most, cmap="turbo", s=26, edgecolors="black", linewidths=0.6
    )
    left, top, right, bottom = seen.box
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=GREEN, linewidth=1.8))
    axes.scatter(*seen.reference, c=GREEN, marker="+", s=160, linewidths=2.2, zorder=3)
    return dots


def _title(seen: Look, shown: list[int], width: int, height: int) -> str:
    """Name the panel's levels, with the part of the weight that they have, and the points that cannot be seen."""
    points = seen.points[:, shown].reshape(-1, 2)
    outside = int(((points < 0) | (points > (width, height))).any(1).sum())
    if len(shown) > 1:
        title = f"all {len(shown)} levels, {len(points)} points"
    else:
        stride, rows, columns = seen.levels[shown[0]]
        part = float(seen.weights[:, shown].sum() / seen.weights.sum())
        title = f"stride {stride}, {columns} x {rows} cells, {part:.0%} of the weight"
    return title + (f"\n{outside} of {len(points)} points outside" if outside else "")
