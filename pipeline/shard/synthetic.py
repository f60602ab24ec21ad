"""Draws a synthetic COCO-format dataset from a seed: shapes on textured backgrounds, so that a demo needs no download.

Six classes (ids with gaps) of 8 to 64 px, 0 to 10 in an image, with overlaps. Boxes, polygons and areas are those of
the visible pixels, and no object is hidden by more than `MOST_HIDDEN`. Every 20th image is empty; every 25th has a
crowd region: a swarm of tiny shapes under one iscrowd annotation.

A class is a shape. Its colours lie about a hue of its own, so widely that neighbours share some of them:
colour helps a detector to learn within minutes, and does not suffice.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.config.sections import DatasetSection, SyntheticSection
from pipeline.errors import UserError
from pipeline.files import disk_error, locked
from pipeline.log import get_logger, outcome

SETTINGS_NAME = "synthetic.json"
FORMAT = 1

SPLITS = (("train", "train2017", "instances_train2017.json"), ("val", "val2017", "instances_val2017.json"))
"""Name, folder of images and annotation file of each split: COCO's, so that the defaults of the config find them."""

CATEGORIES = {1: "circle", 2: "square", 4: "triangle", 7: "star", 8: "cross", 11: "ring"}

SMALLEST, GREATEST = 8, 64
"""Longer side of an object's box before anything hides it, in pixels."""
MOST_OBJECTS = 10
MOST_HIDDEN = 0.25
PLACING_TRIES = 30
HUE_SPREAD = 35
"""Degrees that a colour may lie off the hue of its class; the hues are 60 apart."""
LEAST_CONTRAST = 110.0
"""Euclidean RGB distance between an object and the mean of the background."""
EMPTY_EVERY, EMPTY_AT = 20, 3
CROWD_EVERY, CROWD_AT = 25, 7
JPEG_QUALITY = 92
SUBPIXEL_BITS = 4

Mask = NDArray[np.bool_]
logger = get_logger(__name__)


def draw_configured(dataset: DatasetSection) -> None:
    """Draws the dataset where one is configured, into its root; errors as of `draw_dataset`."""
    if dataset.synthetic is None:
        return
    if not isinstance(dataset.place, Path):
        raise UserError(f"dataset.root {dataset.root}: a dataset is drawn into a folder of this machine; set one")
    draw_dataset(dataset.place, dataset.synthetic)


def draw_dataset(root: Path, settings: SyntheticSection, key: str = "dataset.root") -> Path:
    """Draws both splits into `root` unless they are there already.

    The same settings give the same bytes. All is drawn into a hidden folder beside `root`, then renamed.

    Args:
        root: the dataset's folder.
        settings: what is drawn.
        key: what to set for another folder, for messages.

    Raises:
        UserError: `root` holds something else, or there is no space.
    """
    wanted = {"format": FORMAT, **settings.model_dump()}
    if _is_drawn(root, wanted, key):
        logger.info(outcome("synthetic dataset", f"in {root}", is_new=False))
        return root
    unfinished = root.with_name(f".{root.name}.partial")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with locked(root.with_name(f".{root.name}.lock")):
            if _is_drawn(root, wanted, key):
                return root
            shutil.rmtree(unfinished, ignore_errors=True)
            for number, (split, images, annotations) in enumerate(SPLITS):
                count = settings.train_images if split == "train" else settings.val_images
                _draw_split(unfinished, number, count, images, annotations, settings)
            (unfinished / SETTINGS_NAME).write_text(json.dumps(wanted, indent=1, sort_keys=True) + "\n")
            os.replace(unfinished, root)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise disk_error(root, error, key) from error
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    logger.info("synthetic dataset: drew %d + %d images in %s", settings.train_images, settings.val_images, root)
    return root


def _is_drawn(root: Path, wanted: dict[str, Any], key: str) -> bool:
    """Whether the dataset with these settings is there; refuses anything else in the folder."""
    try:
        found = json.loads((root / SETTINGS_NAME).read_text())
    except PermissionError as error:
        raise disk_error(root, error, key) from error
    except (FileNotFoundError, NotADirectoryError):
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise UserError(
                f"{root}: not a synthetic dataset and not empty, so nothing is drawn there; choose another folder "
                f"({key})"
            ) from None
        return False
    except ValueError:
        found = {}
    if found != wanted:
        changes = [f"{key} was {found.get(key)!r}, now {value!r}" for key, value in wanted.items()
                   if found.get(key) != value]  # fmt: skip
        raise UserError(
            f"{root}: drawn with other settings ({'; '.join(changes)}); set another {key}, or delete the folder"
        )
    return True


def _draw_split(root: Path, number: int, count: int, images: str, annotations: str, settings: SyntheticSection) -> None:
    folder = root / images
    folder.mkdir(parents=True)
    document: dict[str, list[Any]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": key, "name": name, "supercategory": "shape"} for key, name in CATEGORIES.items()],
    }
    for index in range(count):
        image_id = number * 1_000_000 + index + 1
        seed = np.random.SeedSequence([abs(settings.seed), int(settings.seed < 0), number, index])
        picture = _Picture(settings.image_size, np.random.Generator(np.random.Philox(seed)))
        picture.fill(empty=index % EMPTY_EVERY == EMPTY_AT, crowd=index % CROWD_EVERY == CROWD_AT)
        name = f"{image_id:012d}.jpg"
        (folder / name).write_bytes(picture.jpeg())
        document["images"].append(
            {"id": image_id, "file_name": name, "width": settings.image_size, "height": settings.image_size}
        )
        for annotation in picture.annotations():
            annotation_id = number * 100_000_000 + len(document["annotations"]) + 1
            document["annotations"].append({"id": annotation_id, "image_id": image_id, **annotation})
    path = root / "annotations" / annotations
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, sort_keys=True, separators=(",", ":")))


@dataclass
class _Object:
    category_id: int
    pixels: int  # before anything hides it
    crowd: bool = False


class _Picture:
    """One image while it is drawn: its pixels, and which object each pixel shows."""

    def __init__(self, size: int, generator: np.random.Generator) -> None:
        self._size = size
        self._generator = generator
        self._pixels = _background(size, generator)  # float32 [size, size, 3]
        self._mean = self._pixels.mean(axis=(0, 1))
        self._owner = np.zeros((size, size), dtype=np.int32)  # 0 is the background, k is object k - 1
        self._objects: list[_Object] = []

    def fill(self, *, empty: bool, crowd: bool) -> None:
        if crowd:
            self._add_crowd()
        if not empty:
            # Few objects are likelier than many: p(n) falls linearly from 1 to MOST_OBJECTS.
            weights = np.arange(MOST_OBJECTS, 0, -1, dtype=np.float64)
            wanted = 1 + int(np.searchsorted(np.cumsum(weights / weights.sum()), self._generator.random()))
            for _ in range(min(wanted, MOST_OBJECTS - len(self._objects))):
                self._add_object()

    def _add_object(self) -> None:
        """Draws a shape where it hides nothing too much; gives up after some tries."""
        category_id = _choice(self._generator, list(CATEGORIES))
        for _ in range(PLACING_TRIES):
            side = SMALLEST + (GREATEST - SMALLEST) * self._generator.random()
            outline = _outline(category_id, side, self._generator)
            span = np.ptp(outline[0], axis=0)
            corner = self._generator.random(2) * (self._size - span)
            coverage = self._coverage([part + corner for part in outline])
            mask = coverage >= 0.5
            if mask.any() and self._can_hide(mask):
                self._paint(coverage, mask, _Object(category_id, int(mask.sum())))
                return

    def _add_crowd(self) -> None:
        """A swarm of tiny shapes of one class in one region."""
        category_id = _choice(self._generator, list(CATEGORIES))
        region = np.array([44.0, 32.0])
        corner = self._generator.random(2) * (self._size - region)
        union = np.zeros((self._size, self._size), dtype=np.float32)
        for _ in range(24):
            outline = _outline(category_id, 5 + 3 * self._generator.random(), self._generator)
            place = corner + self._generator.random(2) * (region - np.ptp(outline[0], axis=0))
            union = np.maximum(union, self._coverage([part + place for part in outline]))
        mask = union >= 0.5
        self._paint(union, mask, _Object(category_id, int(mask.sum()), crowd=True))

    def _can_hide(self, mask: Mask) -> bool:
        hidden = np.bincount(self._owner[mask], minlength=len(self._objects) + 1)[1:]
        visible = np.bincount(self._owner.ravel(), minlength=len(self._objects) + 1)[1:]
        return all(
            covered == 0 or visible[k] - covered >= (1 - MOST_HIDDEN) * self._objects[k].pixels
            for k, covered in enumerate(hidden)
        )

    def _paint(self, coverage: NDArray[np.float32], mask: Mask, drawn: _Object) -> None:
        color = self._color(drawn.category_id)
        # A slight gradient and a darker rim tell overlapping shapes of like colours apart.
        shade = np.linspace(0.88, 1.12, self._size)[:, None, None].astype(np.float32)
        rows, columns = _extent(coverage > 0)
        under = self._pixels[rows, columns]
        under += coverage[rows, columns, None] * (color * shade[rows] - under)
        if drawn.pixels > 150 and not drawn.crowd:
            inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=0).astype(bool)
            self._pixels[mask & ~inner] *= 0.6
        self._objects.append(drawn)
        self._owner[mask] = len(self._objects)

    def _color(self, category_id: int) -> NDArray[np.float32]:
        hue = 360 / len(CATEGORIES) * list(CATEGORIES).index(category_id)
        while True:
            turn, saturation, value = self._generator.random(3)
            hsv = [(hue + HUE_SPREAD * (2 * turn - 1)) % 360, 0.45 + 0.55 * saturation, 0.35 + 0.65 * value]
            color = 255 * cv2.cvtColor(np.array([[hsv]], dtype=np.float32), cv2.COLOR_HSV2RGB)[0, 0]
            if math.dist(color, self._mean) >= LEAST_CONTRAST:
                return np.asarray(color, dtype=np.float32)

    def _coverage(self, outline: list[NDArray[np.float64]]) -> NDArray[np.float32]:
        """How much of each pixel a shape covers, float32 [size, size] in 0..1; a second part is a hole.

        Coordinates are pixel edges, so a pixel's centre lies at half a pixel.
        """
        covered = np.zeros((self._size, self._size), dtype=np.uint8)
        for part, value in zip(outline, (255, 0), strict=False):
            points = np.round((part - 0.5) * 2**SUBPIXEL_BITS).astype(np.int32)
            cv2.fillPoly(covered, [points], value, lineType=cv2.LINE_AA, shift=SUBPIXEL_BITS)
        return np.divide(covered, 255, dtype=np.float32)

    def jpeg(self) -> bytes:
        noise = self._generator.normal(0, 4, self._pixels.shape)
        pixels = np.clip(self._pixels + noise, 0, 255).astype(np.uint8)
        parameters = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
        written, content = cv2.imencode(".jpg", pixels[..., ::-1], parameters)
        assert written
        return content.tobytes()

    def annotations(self) -> list[dict[str, Any]]:
        found = []
        for number, drawn in enumerate(self._objects, start=1):
            visible = self._owner == number
            rows, columns = _extent(visible)
            found.append(
                {
                    "category_id": drawn.category_id,
                    "bbox": [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
                    "area": int(visible.sum()),
                    "iscrowd": int(drawn.crowd),
                    "segmentation": _run_lengths(visible) if drawn.crowd else _polygons(visible),
                }
            )
        return found


def _background(size: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """Two scales of smooth noise about a random colour, float32 [size, size, 3]."""
    pixels = np.full((size, size, 3), 60 + 135 * generator.random(3), dtype=np.float32)
    for cells, strength in ((4, 14.0), (24, 7.0)):
        grid = (generator.random((cells, cells, 3)) * 2 - 1).astype(np.float32)
        pixels += strength * cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
    return pixels


def _outline(category_id: int, side: float, generator: np.random.Generator) -> list[NDArray[np.float64]]:
    """A shape's polygon, turned a little, and that of its hole if it has one; the longer side of the box is `side`."""
    angle = (generator.random() * 2 - 1) * math.pi / 10
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    parts = [part @ turn.T for part in SHAPES[CATEGORIES[category_id]]()]
    corner = parts[0].min(axis=0)
    scale = side / np.ptp(parts[0], axis=0).max()
    return [(part - corner) * scale for part in parts]


def _regular(points: int, radii: tuple[float, ...] = (1.0,)) -> NDArray[np.float64]:
    angles = np.arange(points) * 2 * math.pi / points - math.pi / 2
    radius = np.resize(np.array(radii), points)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _circle() -> list[NDArray[np.float64]]:
    return [_regular(48)]


def _square() -> list[NDArray[np.float64]]:
    return [np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])]


def _triangle() -> list[NDArray[np.float64]]:
    return [_regular(3)]


def _star() -> list[NDArray[np.float64]]:
    return [_regular(10, (1.0, 0.42))]


def _cross() -> list[NDArray[np.float64]]:
    arm = 0.32
    quarter = np.array([[-arm, -1], [arm, -1], [arm, -arm]])
    turns = [np.array([[c, -s], [s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    return [np.concatenate([quarter @ turn.T for turn in turns]).astype(np.float64)]


def _ring() -> list[NDArray[np.float64]]:
    return [_regular(48), 0.55 * _regular(48)]


SHAPES: dict[str, Callable[[], list[NDArray[np.float64]]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}


def _polygons(mask: Mask) -> list[list[float]]:
    """COCO polygons around the outer borders of a mask, in pixel edges."""
    # Every pixel becomes 2x2, so that a contour through pixel centres encloses single pixels and thin lines too.
    rows, columns = _extent(mask)
    doubled = mask[rows, columns].astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    corner = np.array([columns.start, rows.start])
    return [((contour.reshape(-1, 2) + 0.5) / 2 + corner).ravel().tolist() for contour in contours]


def _extent(mask: Mask) -> tuple[slice, slice]:
    """The rows and columns that hold a mask, which is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _run_lengths(mask: Mask) -> dict[str, list[int]]:
    """COCO's uncompressed run lengths: column by column, beginning with zeros."""
    flat = mask.ravel(order="F").astype(np.int8)
    borders = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
    ends = np.concatenate([[0], borders, [] if borders[-1] == flat.size else [flat.size]]).astype(np.int64)
    return {"counts": np.diff(ends).tolist(), "size": list(mask.shape)}


def _choice(generator: np.random.Generator, values: list[int]) -> int:
    return values[int(generator.random() * len(values))]
