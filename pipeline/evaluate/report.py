"""What people look at: detections beside ground truth as pictures, and AP by category as a table, a file and a plot."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.data.index import Sample
from pipeline.data.manifest import Manifest, UnreadableSampleError, read_annotations
from pipeline.data.samples import load_image
from pipeline.data.truth import original_size, scaled_box
from pipeline.errors import shown
from pipeline.log import get_logger
from pipeline.predict.attention import MOST_NAME
from pipeline.predict.draw import draw_boxes

logger = get_logger(__name__)

LEAST_SIDE = 400
"""Smaller pictures are enlarged to this long side, in pixels, so that names can be read."""
COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
"""Metrics of the tables by category."""
PLOTTED = 40
"""Most categories of a plot."""


def choose_samples(manifest: Manifest, count: int) -> list[Sample]:
    """Choose samples at even distances in the order of the image ids: the same whatever was detected."""
    samples = sorted(manifest.samples, key=lambda sample: sample.image_id)
    count = min(count, len(samples))
    return [samples[index * len(samples) // count] for index in range(count)]


def write_pictures(
    manifest: Manifest, detections: Sequence[Mapping[str, Any]], folder: Path, count: int, least_score: float
) -> list[Path]:
    """Draw detections (left) beside ground truth (right) for some images of a split.

    Args:
        manifest: the split.
        detections: in COCO's result format, in pixels of the original images.
        folder: where `<image id>.png` go; made when missing.
        count: most pictures.
        least_score: least score of a detection that is drawn.

    Returns:
        The pictures' paths; an image that cannot be read is left out with a warning.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for sample in choose_samples(manifest, count):
        try:
            width, height = original_size(manifest, sample)
            pixels = load_image(manifest, sample)
        except UnreadableSampleError as error:
            logger.warning("not drawn: %s", error)
            continue
        x, y = sample.width / width, sample.height / height
        own = [
            {**detection, "bbox": scaled_box(detection["bbox"], x, y)}
            for detection in detections
            if detection["image_id"] == sample.image_id and detection["score"] >= least_score
        ]
        truth = read_annotations(manifest, sample)["annotations"]
        halves = [draw_boxes(pixels, entries, manifest.labels.names, LEAST_SIDE) for entries in (own, truth)]
        path = folder / f"{sample.image_id:012d}.png"
        _side_by_side(halves, ("detections", "ground truth")).save(path)
        paths.append(path)
    return paths


def _side_by_side(pictures: Sequence[Image.Image], titles: Sequence[str], gap: int = 8) -> Image.Image:
    font = ImageFont.load_default(size=16.0)
    head = 26
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, head + max(picture.height for picture in pictures)), "white")
    draw = ImageDraw.Draw(canvas)
    left = 0
    for picture, title in zip(pictures, titles, strict=True):
        draw.text((left + 4, 3), title, fill="black", font=font)
        canvas.paste(picture, (left, head))
        left += picture.width + gap
    return canvas


def plot_categories(metrics: Mapping[str, Any], path: Path) -> Path:
    """Plot AP and AP50 of each category as bars, the best on top; of many categories the best and the worst."""
    known = {name: values for name, values in metrics["per_category"].items() if values["AP"] >= 0}
    ranked = sorted(known, key=lambda name: (known[name]["AP"], name))
    if len(ranked) > PLOTTED:
        ranked = ranked[: PLOTTED // 2] + ranked[-PLOTTED // 2 :]
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.6 + 0.28 * len(ranked)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = np.arange(len(ranked))
    axes.barh(rows, [known[name]["AP50"] for name in ranked], height=0.75, color="#c6dbef", label="AP50")
    axes.barh(rows, [known[name]["AP"] for name in ranked], height=0.45, color="#2171b5", label="AP")
    axes.set_yticks(rows, [shown(name, MOST_NAME) for name in ranked], parse_math=False)
    axes.set_xlim(0, 1)
    axes.set_xlabel("average precision")
    axes.set_title(f"AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f} over {len(known)} categories")
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def write_category_table(metrics: Mapping[str, Any], path: Path) -> Path:
    """Write the metrics of each category as CSV; an empty cell where there is no object to find."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["category", *COLUMNS])
        for name, values in metrics["per_category"].items():
            writer.writerow([name, *(values[column] if values[column] >= 0 else "" for column in COLUMNS)])
    return path


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Return the metrics of each category, and over all, as a table for a terminal; - where there is no object."""
    table = Table("category", box=None, pad_edge=False)
    columns = [name for name in (*COLUMNS, "AR") if name in metrics]
    for column in columns:
        table.add_column(column, justify="right")
    for name, values in (*metrics["per_category"].items(), ("all", metrics)):
        table.add_row(
            Text(shown(name)), *(f"{values[column]:.4f}" if values[column] >= 0 else "-" for column in columns)
        )
    text = io.StringIO()
    Console(file=text, width=110, color_system=None).print(table)
    return text.getvalue().rstrip("\n")
