"""Draws a detector's answers on pictures: boxes with names, and what a detection looked at."""

import colorsys
import csv
import io
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.images import Pixels
from pipeline.errors import UserError, shown
from pipeline.files import disk_told, make_folder, write_json, write_whole
from pipeline.log import get_logger
from pipeline.predict.attention import MOST_NAME, check_samples, look, save_look
from pipeline.predict.detector import Detection, Detector
from pipeline.predict.pictures import AHEAD, Picture, read_ahead

logger = get_logger(__name__)

MOST_STEM = 200
"""Bytes of a picture's name that are kept: a disk takes 255, and more is put behind it."""


def draw_boxes(
    pixels: NDArray[np.uint8], entries: Sequence[Mapping[str, Any]], names: Mapping[int, str], least_side: int = 0
) -> Image.Image:
    """Draw boxes with names on a picture.

    Args:
        pixels: RGB uint8 [height, width, 3].
        entries: detections (bbox xywh, category_id, score) or annotations (iscrowd instead of score).
        names: category names by id.
        least_side: enlarge the picture to this long side, in pixels, if it is smaller.
    """
    picture = Image.fromarray(pixels)
    scale = max(1.0, least_side / max(picture.size))
    if scale > 1:
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
    draw = ImageDraw.Draw(picture)
    line = max(2, round(max(picture.size) / 400))
    font = ImageFont.load_default(size=max(11.0, max(picture.size) / 50))
    for entry in sorted(entries, key=lambda entry: entry.get("score", 1.0)):
        x, y, width, height = (value * scale for value in entry["bbox"])
        color = category_color(entry["category_id"])
        text = shown(names.get(entry["category_id"], entry["category_id"]), MOST_NAME)
        if "score" in entry:
            text += f" {entry['score']:.2f}"
        if entry.get("iscrowd"):
            text += " (crowd)"
        draw.rectangle((x, y, x + max(width, 1), y + max(height, 1)), outline=color, width=line)
        left, top, right, bottom = draw.textbbox((x, y), text, font=font)
        lift = min(bottom - y, max(y, 0))
        draw.rectangle((left, top - lift, right, bottom - lift), fill=color)
        draw.text((x, y - lift), text, fill="white", font=font)
    return picture


def category_color(category_id: int) -> tuple[int, int, int]:
    """Return a dark, strong color of a category: the same in every picture."""
    hue = category_id * 0.618034 % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.9, 0.75)
    return round(red * 255), round(green * 255), round(blue * 255)


class Drawn(NamedTuple):
    """What came of drawing: how many pictures, their detections, the best score of any, and who could not be used.

    `seconds` is what reading, detecting and drawing took, without the time before the first picture.
    """

    pictures: int
    detections: int
    best: float | None
    unusable: tuple[str, ...]
    seconds: float


def draw_pictures(
    detector: Detector,
    pictures: Sequence[Picture],
    out: Path,
    *,
    score_threshold: float,
    show_attention: int = 0,
    queries: Sequence[int] = (),
    table: Path | None = None,
    batch_size: int = 1,
) -> Drawn:
    """Draw a detector's answers on pictures; `<out>/images.json` tells the pictures, `<out>/detections.json` the boxes.

    The first is a COCO file without annotations, with the names of what was drawn; the second COCO's results, clipped
    to the pictures. A picture that cannot be used is named, and the others are drawn. No picture that was given is
    written over. Pictures are decoded and drawn while the network runs on others.

    Args:
        detector: answers.
        pictures: as `find_pictures` gives them.
        out: folder of the drawn pictures (PNG).
        score_threshold: least score.
        show_attention: for how many of the best detections, whatever their score, to draw what they looked at as well.
        queries: the queries to draw that for instead.
        table: a CSV file to write, with a line a detection.
        batch_size: most pictures that go through the network at once; they are of one size, so that the answer to one
            does not depend on the others.

    Returns:
        What came of it.

    Raises:
        UserError: none of the pictures can be used, or `out` cannot be made or the disk is full.
    """
    if show_attention or queries:
        check_samples(detector)
    make_folder(out)
    names, unusable = _Names(out, pictures), list[str]()
    began = time.perf_counter()
    with disk_told(out, "--out"), _readers() as readers, ThreadPoolExecutor(AHEAD) as pool:
        drawing = _Drawing(pool, detector, out, names, score_threshold, (show_attention, queries))
        for batch in _batches(read_ahead(readers, pictures), batch_size, unusable):
            answers = detector.detect_in([pixels for _, pixels in batch])
            for (picture, pixels), found in zip(batch, answers, strict=True):
                drawing.add(picture, pixels, found)
        drawing.wait()
        if not drawing.images:
            raise UserError(f"{unusable[0]}; none of the {len(pictures)} pictures can be used")
        seconds = time.perf_counter() - began
        categories = [{"id": number, "name": name} for number, name in detector.labels.names.items()]
        write_json(out / "images.json", {"images": drawing.images, "categories": categories})
        write_json(out / "detections.json", drawing.detections)
    if table is not None:
        with disk_told(table, "--csv"):
            write_whole(table, _table(drawing.images, drawing.detections).encode(errors="backslashreplace"))
    return Drawn(len(drawing.images), len(drawing.detections), drawing.best, tuple(unusable), seconds)


@contextmanager
def _readers() -> Iterator[ThreadPoolExecutor]:
    """Threads that are not waited for where the block fails or is interrupted: a server may let them hang."""
    pool = ThreadPoolExecutor(AHEAD)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _batches(
    read: Iterable[tuple[Picture, Pixels | UserError]], size: int, unusable: list[str]
) -> Iterator[list[tuple[Picture, Pixels]]]:
    """The pictures that can be used, so many of one size at once; what is wrong with the others is told and kept."""
    batch: list[tuple[Picture, Pixels]] = []
    for picture, pixels in read:
        if isinstance(pixels, UserError):
            unusable.append(str(pixels))
            logger.warning("left out: %s", unusable[-1])
            continue
        if batch and (len(batch) == size or pixels.shape != batch[0][1].shape):
            yield batch
            batch = []
        batch.append((picture, pixels))
    if batch:
        yield batch


def _clipped(entry: Mapping[str, Any], width: int, height: int) -> dict[str, Any]:
    """A detection whose box is in its picture."""
    x, y, w, h = entry["bbox"]
    left, right = (min(max(value, 0.0), float(width)) for value in (x, x + w))
    top, bottom = (min(max(value, 0.0), float(height)) for value in (y, y + h))
    return {**entry, "bbox": [left, top, right - left, bottom - top]}


class _Drawing:
    """What was found in pictures, which threads draw, a few at a time.

    `best` is the best score of any detection; `looks` tells for how many of a picture's detections, and of which
    queries, to draw what they looked at.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        detector: Detector,
        out: Path,
        names: "_Names",
        threshold: float,
        looks: tuple[int, Sequence[int]],
    ) -> None:
        self.images: list[dict[str, Any]] = []
        self.detections: list[Detection] = []
        self.best: float | None = None
        self._pool, self._running = pool, deque[Future[None]]()
        self._detector, self._out, self._names = detector, out, names
        self._threshold, self._looks = threshold, looks

    def add(self, picture: Picture, pixels: Pixels, found: Sequence[Detection]) -> None:
        """Keep what was found in a picture, and begin to draw it."""
        height, width = pixels.shape[:2]
        entries = [_clipped(entry, width, height) for entry in found if entry["score"] >= self._threshold]
        if found:  # best first
            self.best = max(found[0]["score"], self.best or 0.0)
        name = self._names.new(_cut(picture.stem))
        self._running.append(self._pool.submit(self._draw, pixels, entries, self._out / f"{name}.png"))
        image = {"id": picture.id, "file_name": picture.name, "width": width, "height": height}
        self.images.append(image | {"drawn": f"{name}.png"})
        self.detections += [{"image_id": picture.id, **entry} for entry in entries]
        top, queries = self._looks
        if top or queries:
            looks = look(self._detector, pixels, queries, top)
            places = [(seen, self._out / f"{self._names.new(f'{name}_query{seen.query}')}.png") for seen in looks]
            self.images[-1]["attention"] = [save_look(pixels, seen, place).name for seen, place in places]
        self.wait(AHEAD)

    def wait(self, most: int = 0) -> None:
        """Wait until no more pictures are left to be drawn than so many."""
        while len(self._running) > most:
            self._running.popleft().result()

    def _draw(self, pixels: Pixels, entries: Sequence[Detection], path: Path) -> None:
        draw_boxes(pixels, entries, self._detector.labels.names).save(path)


def _table(images: Sequence[Mapping[str, Any]], detections: Sequence[Mapping[str, Any]]) -> str:
    """The detections as CSV; boxes are pixels of the picture."""
    names = {image["id"]: image["file_name"] for image in images}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file_name", "image_id", "category_id", "category", "score", "left", "top", "width", "height"])
    for entry in detections:
        columns = (entry["category_id"], entry["category"], entry["score"], *entry["bbox"])
        writer.writerow([names[entry["image_id"]], entry["image_id"], *columns])
    return text.getvalue()


class _Names:
    """New names of drawn pictures: each is given once, and none is that of a picture that was given."""

    def __init__(self, out: Path, pictures: Sequence[Picture]) -> None:
        self._out = out
        self._taken: set[str] = set()
        self._given = {_identity(picture.path) for picture in pictures if picture.path is not None}

    def new(self, stem: str) -> str:
        """The stem, with as many _ behind it as it takes."""
        name = stem
        while name in self._taken or _identity(self._out / f"{name}.png") in self._given:
            name += "_"
        self._taken.add(name)
        return name


def _cut(stem: str) -> str:
    """So much of it that it can be a file's name."""
    while len(os.fsencode(stem)) > MOST_STEM:
        stem = stem[:-1]
    return stem


def _identity(path: Path) -> tuple[int, int] | Path:
    """What tells a file from all others, whatever its name."""
    try:
        status = path.stat()
    except OSError:
        return path
    return status.st_dev, status.st_ino
