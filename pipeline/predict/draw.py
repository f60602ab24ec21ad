"""Draws a detector's answers on pictures: boxes with names, and what a detection looked at."""

import colorsys
import csv
import glob
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.images import PICTURES, BadImageError, read_image_file
from pipeline.errors import UserError, shown
from pipeline.files import disk_told, make_folder, read_json, write_json, write_whole
from pipeline.log import get_logger
from pipeline.predict.attention import MOST_NAME, check_samples, look, save_look
from pipeline.predict.detector import Detector, read_picture

logger = get_logger(__name__)


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


def find_pictures(images: Sequence[Path], root: Path | None = None) -> list[Path]:
    """The pictures that are meant by files, folders, patterns such as `new/**/*.jpg`, and COCO files (.json).

    Args:
        images: all of these.
        root: folder that the names in COCO files begin in; each file's own when None.

    Raises:
        UserError: there is no such file, no picture in a folder or of a pattern, or a JSON file is not COCO's.
    """
    paths: list[Path] = []
    for path in images:
        if path.is_dir():
            paths += _inside(path)
        elif path.suffix.lower() == ".json" and path.is_file():
            paths += _listed(path, root or path.parent)
        elif path.is_file():
            paths.append(path)
        elif glob.has_magic(str(path)):
            found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
            found = [file for file in found if file.suffix.lower() in PICTURES]
            if not found:
                raise UserError(f"{shown(path, 400)}: no picture has a name of this pattern ({', '.join(PICTURES)})")
            paths += found
        else:
            raise UserError(f"{shown(path, 400)}: no such picture or folder")
    return paths


def _inside(folder: Path) -> list[Path]:
    """The pictures of a folder."""
    try:
        inside = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)
    except OSError as error:
        raise UserError(f"{folder}: this folder cannot be read: {error.strerror}") from error
    if not inside:
        raise UserError(f"{folder}: no picture in this folder ({', '.join(PICTURES)})")
    return inside


def _listed(file: Path, root: Path) -> list[Path]:
    """The pictures of a COCO file."""
    document = read_json(file, "COCO file")
    images = document.get("images") if isinstance(document, dict) else None
    if not isinstance(images, list) or not images:
        raise UserError(f"{file}: no COCO file, which has a list `images` with an image at least")
    paths = []
    for number, image in enumerate(images):
        name = image.get("file_name") if isinstance(image, dict) else None
        if not isinstance(name, str) or not name:
            raise UserError(f"{file}: images[{number}] has no file_name")
        paths.append(root / name)
    return paths


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
    paths: Sequence[Path],
    out: Path,
    *,
    score_threshold: float,
    show_attention: int = 0,
    queries: Sequence[int] = (),
    table: Path | None = None,
) -> Drawn:
    """Draw a detector's answers on pictures, and write them to `<out>/detections.json`.

    A picture that cannot be used is named, and the others are drawn. No picture that was given is written over.

    Args:
        detector: answers.
        paths: of the pictures.
        out: folder of the drawn pictures (PNG).
        score_threshold: least score.
        show_attention: for how many of the best detections, whatever their score, to draw what they looked at as well.
        queries: the queries to draw that for instead.
        table: a CSV file to write, with a line a detection.

    Returns:
        What came of it.

    Raises:
        UserError: none of the pictures can be used, or `out` is their folder or cannot be made.
    """
    looks_wanted = bool(show_attention or queries)
    if looks_wanted:
        check_samples(detector)
    make_folder(out)
    names = _Names(out, paths)
    found: list[dict[str, Any]] = []
    unusable: list[str] = []
    scores: list[float] = []
    began = time.perf_counter()
    for path in paths:
        try:
            pixels = read_picture(read_image_file(path))
        except (OSError, BadImageError, UserError) as error:
            unusable.append(f"{shown(path, 400)}: {getattr(error, 'strerror', None) or error}")
            logger.warning("left out: %s", unusable[-1])
            continue
        everything = detector(pixels)
        scores += [entry["score"] for entry in everything]
        detections = [entry for entry in everything if entry["score"] >= score_threshold]
        name = names.new(path.stem)
        draw_boxes(pixels, detections, detector.labels.names).save(out / f"{name}.png")
        found.append({"file_name": str(path), "drawn": f"{name}.png", "detections": detections})
        if looks_wanted:
            looks = look(detector, pixels, queries, show_attention)
            paths_of_looks = [(seen, out / f"{names.new(f'{name}_query{seen.query}')}.png") for seen in looks]
            found[-1]["attention"] = [save_look(pixels, seen, place).name for seen, place in paths_of_looks]
    if not found:
        raise UserError(f"{unusable[0]}; none of the {len(paths)} pictures can be used")
    seconds = time.perf_counter() - began
    write_json(out / "detections.json", found)
    if table is not None:
        with disk_told(table, "--csv"):
            write_whole(table, _table(found).encode())
    count = sum(len(entry["detections"]) for entry in found)
    return Drawn(len(found), count, max(scores, default=None), tuple(unusable), seconds)


def _table(found: Sequence[Mapping[str, Any]]) -> str:
    """The detections as CSV; boxes are pixels of the picture."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file_name", "category_id", "category", "score", "left", "top", "width", "height"])
    for picture in found:
        for entry in picture["detections"]:
            columns = (entry["category_id"], entry["category"], entry["score"], *entry["bbox"])
            writer.writerow([picture["file_name"], *columns])
    return text.getvalue()


class _Names:
    """New names of drawn pictures: each is given once, and none is that of a picture that was given."""

    def __init__(self, out: Path, paths: Sequence[Path]) -> None:
        self._out = out
        self._taken: set[str] = set()
        self._given = {_identity(path) for path in paths}

    def new(self, stem: str) -> str:
        """The stem, with as many _ behind it as it takes."""
        name = stem
        while name in self._taken or _identity(self._out / f"{name}.png") in self._given:
            name += "_"
        self._taken.add(name)
        return name


def _identity(path: Path) -> tuple[int, int] | Path:
    """What tells a file from all others, whatever its name."""
    try:
        status = path.stat()
    except OSError:
        return path
    return status.st_dev, status.st_ino
