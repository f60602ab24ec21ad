"""Draws a detector's answers on pictures: boxes with names, and what a detection looked at."""

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.errors import UserError
from pipeline.files import make_folder, write_json
from pipeline.predict.attention import check_samples, look, save_look
from pipeline.predict.detector import Detector, read_picture

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


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
        text = names.get(entry["category_id"], str(entry["category_id"]))
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


def find_pictures(images: Sequence[Path]) -> list[Path]:
    """The pictures that are meant by files, and by folders of them.

    Raises:
        UserError: there is no such file, or no picture in a folder.
    """
    paths: list[Path] = []
    for path in images:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
            if not inside:
                raise UserError(f"{path}: no picture in this folder ({', '.join(PICTURES)})")
            paths += inside
        elif path.is_file():
            paths.append(path)
        else:
            raise UserError(f"{path}: no such picture or folder")
    return paths


def draw_pictures(
    detector: Detector,
    paths: Sequence[Path],
    out: Path,
    *,
    score_threshold: float,
    show_attention: int = 0,
    queries: Sequence[int] = (),
) -> None:
    """Draw a detector's answers on pictures, and write them to `<out>/detections.json`.

    Args:
        detector: answers.
        paths: of the pictures.
        out: folder of the drawn pictures (PNG).
        score_threshold: least score.
        show_attention: for how many of the best detections, whatever their score, to draw what they looked at as well.
        queries: the queries to draw that for instead.

    Raises:
        UserError: naming the picture that cannot be used, or `out` if it cannot be made.
    """
    looks_wanted = bool(show_attention or queries)
    if looks_wanted:
        check_samples(detector)
    make_folder(out)
    found: list[dict[str, Any]] = []
    taken: set[str] = set()
    for path in paths:
        try:
            pixels = read_picture(path.read_bytes())
        except (OSError, UserError) as error:
            raise UserError(f"{path}: {error}") from error
        detections = detector(pixels, score_threshold)
        name = path.stem
        while name in taken:
            name += "_"
        taken.add(name)
        draw_boxes(pixels, detections, detector.labels.names).save(out / f"{name}.png")
        found.append({"file_name": str(path), "drawn": f"{name}.png", "detections": detections})
        if looks_wanted:
            looks = look(detector, pixels, queries, show_attention)
            drawn = [save_look(pixels, seen, out / f"{name}_query{seen.query}.png").name for seen in looks]
            found[-1]["attention"] = drawn
    write_json(out / "detections.json", found)
