"""What is scored: ground truth and detections, checked, with ids of their own.

Images, categories and annotations are numbered from 1, in the order of their ids (annotations in that of the file), so
that ids of text and negative ones score like any others. An annotation of a file keeps the id 0, with which a match
counts as none in pycocotools: the number of a file is what pycocotools says.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError, shown
from pipeline.evaluate.detect import Detection
from pipeline.log import get_logger
from pipeline.shard.document import (
    Entries,
    anything,
    check_document,
    check_entry,
    crowd,
    identifier,
    is_finite,
    pixels,
    read_document,
    read_large_document,
    text,
)

logger = get_logger(__name__)

IouType = Literal["bbox", "segm", "keypoints"]
"""What overlaps: boxes, masks, or the 17 key points of a person."""

SHAPES: dict[IouType, str] = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
"""The key of an annotation and of a detection that holds what overlaps."""

NEEDS = {
    "images": {"id": identifier},
    "annotations": {"id": identifier, "image_id": identifier, "category_id": identifier, "bbox": anything},
    "categories": {"id": identifier},
}
"""What an entry of the ground truth must have."""
KEYPOINT_NUMBERS = 51
"""Numbers of a person's key points: x, y and visibility of each."""


@dataclass(frozen=True)
class Truth:
    """Checked ground truth."""

    document: dict[str, Any]
    """A COCO document of numbers."""
    images: dict[Any, int]
    """Number of each image by its id."""
    categories: dict[Any, int]
    """Number of each category by its id."""
    names: list[str]
    """Names of the categories in the order of their numbers; one that several have is followed by the id."""
    files: dict[int, str]
    """File name of each image by its number; empty where the document tells none."""
    sizes: dict[int, tuple[int, int] | None]
    """Width and height of each image by its number, where the document tells them."""


@dataclass(frozen=True)
class Found:
    """Checked detections, as columns."""

    images: "array[int]"
    """Number of the image."""
    categories: "array[int]"
    """Number of the category."""
    scores: "array[float]"
    """Score."""
    shapes: "array[float] | list[Any]"
    """Mask or key points; of boxes the four numbers, one after the other."""

    def boxes(self) -> NDArray[np.float64]:
        """The rows `[detections, 7]` image, x, y, w, h, score, category of detections that are boxes."""
        shapes = np.array(self.shapes, np.float64).reshape(-1, 4)
        return np.column_stack((self.images, shapes, self.scores, self.categories))

    def results(self, iou_type: IouType) -> list[dict[str, Any]]:
        """The entries of COCO's result format."""
        shapes = np.reshape(self.shapes, (-1, 4)).tolist() if iou_type == "bbox" else self.shapes
        columns = zip(self.images, self.categories, self.scores, shapes, strict=True)
        return [
            {"image_id": image, "category_id": category, "score": score, SHAPES[iou_type]: shape}
            for image, category, score, shape in columns
        ]


def ground_truth_of(source: dict[str, Any] | Path, iou_type: IouType) -> Truth:
    """Check ground truth, a COCO document or its file, and number it anew; `source` is left as it is.

    Raises:
        UserError: naming the file and the entry that cannot be used.
    """
    where = str(source) if isinstance(source, Path) else "ground truth"
    document = read_document(source, "annotation file")[1] if isinstance(source, Path) else source
    needs = NEEDS
    if iou_type == "segm":
        needs = {**NEEDS, "images": {**NEEDS["images"], "width": pixels, "height": pixels}}
    check_document(where, document, needs, may_lack=("annotations",))
    _check_ids(where, "annotations", document.get("annotations", ()))
    images, categories = (_numbers(where, name, document[name]) for name in ("images", "categories"))
    for index, entry in enumerate(document["categories"]):
        if entry.get("name") and isinstance(entry["name"], str):
            check_entry(where, f"categories[{index}]", entry, {"name": text})
    sizes = _sizes(document["images"]) if iou_type == "segm" else {}
    keeps_zero = isinstance(source, Path)
    annotations = []
    for index, entry in enumerate(document.get("annotations", ())):
        name = f"{where}: annotation {shown(entry['id'])} (entry {index})"
        _check_place(name, entry, images, categories)
        _check_box(name, entry)
        annotation = _annotation(name, entry, iou_type, sizes)
        is_zero = keeps_zero and entry["id"] == 0
        if is_zero:
            logger.warning("%s: annotation id 0: pycocotools counts a match with it as none; number from 1", where)
        number = {"id": 0 if is_zero else index + 1, "image_id": images[entry["image_id"]]}
        annotations.append({**annotation, **number, "category_id": categories[entry["category_id"]]})
    numbered = {
        "images": [_image(entry, images[entry["id"]]) for entry in document["images"]],
        "categories": [{"id": number, "name": str(number)} for number in categories.values()],
        "annotations": annotations,
    }
    files = {images[entry["id"]]: str(entry.get("file_name") or "") for entry in document["images"]}
    told = {images[entry["id"]]: _size(entry) for entry in document["images"]}
    return Truth(numbered, images, categories, _category_names(document), files, told)


def detections_of(source: list[Detection] | Path, truth: Truth, iou_type: IouType) -> Found:
    """Check detections, entries of COCO's result format or their file.

    Raises:
        UserError: naming the file and the entry that cannot be used.
    """
    where = str(source) if isinstance(source, Path) else "detections"
    entries = read_large_document(source, "detections file")[1] if isinstance(source, Path) else source
    if not isinstance(entries, list | Entries):
        raise UserError(f"{where}: must be a list of detections (COCO's result format), not {type(entries).__name__}")
    shape = SHAPES[iou_type]
    keys = ("image_id", "category_id", shape, "score")
    sizes = _sizes(truth.document["images"]) if iou_type == "segm" else {}
    found = Found(array("q"), array("q"), array("d"), array("d") if iou_type == "bbox" else [])
    for index, entry in enumerate(entries):
        name = f"{where}: entry {index}"
        _check_keys(name, entry, keys)
        _check_place(name, entry, truth.images, truth.categories)
        image = truth.images[entry["image_id"]]
        if iou_type == "bbox":
            _check_box(name, entry)
        elif iou_type == "segm":
            _check_run_lengths(name, entry, sizes[image])
        else:
            _check_keypoints(name, entry)
        if not is_finite(entry["score"]):
            raise UserError(f"{_of(name, entry)}: score is {shown(repr(entry['score']))}, it must be finite")
        found.images.append(image)
        found.categories.append(truth.categories[entry["category_id"]])
        found.scores.append(entry["score"])
        if iou_type == "bbox":
            found.shapes.extend(entry["bbox"])
        else:
            found.shapes.append(entry[shape])
    return found


def _annotation(name: str, entry: dict[str, Any], iou_type: IouType, sizes: dict[Any, list[int]]) -> dict[str, Any]:
    """What is scored of an annotation, without its ids."""
    is_crowd = crowd(entry.get("iscrowd"))
    if is_crowd is None:
        raise UserError(f"{name}: iscrowd is {shown(repr(entry['iscrowd']))}, it must be 0 or 1")
    area = entry.get("area", entry["bbox"][2] * entry["bbox"][3])
    if not is_finite(area):
        raise UserError(f"{name}: area is {shown(repr(area))}, it must be a finite number of square pixels")
    annotation = {"bbox": entry["bbox"], "area": area, "iscrowd": is_crowd}
    if iou_type == "segm":
        _check_keys(name, entry, ("segmentation",))
        if not _is_polygons(entry["segmentation"]):
            _check_run_lengths(name, entry, sizes[entry["image_id"]], may_be_plain=True)
        annotation["segmentation"] = entry["segmentation"]
    elif iou_type == "keypoints":
        _check_keys(name, entry, ("keypoints",))
        _check_keypoints(name, entry)
        visible = sum(value > 0 for value in entry["keypoints"][2::3])
        annotation |= {"keypoints": entry["keypoints"], "num_keypoints": entry.get("num_keypoints", visible)}
    return annotation


def _image(entry: dict[str, Any], number: int) -> dict[str, Any]:
    width, height = _size(entry) or (1, 1)  # scorers want one that boxes do not need
    return {"width": width, "height": height, "id": number}


def _size(entry: dict[str, Any]) -> tuple[int, int] | None:
    is_told = all(pixels(entry.get(key)) is None for key in ("width", "height"))
    return (entry["width"], entry["height"]) if is_told else None


def _sizes(images: Sequence[dict[str, Any]]) -> dict[Any, list[int]]:
    """Height and width by the id of an image."""
    return {image["id"]: [image["height"], image["width"]] for image in images}


def _category_names(document: dict[str, Any]) -> list[str]:
    categories = sorted(document["categories"], key=lambda category: category["id"])
    names = [str(category.get("name") or category["id"]) for category in categories]
    counts = Counter(names)
    return [
        f"{name} ({category['id']})" if counts[name] > 1 else name
        for name, category in zip(names, categories, strict=True)
    ]


def _numbers(where: str, name: str, entries: Sequence[dict[str, Any]]) -> dict[Any, int]:
    """The numbers from 1 that stand for the ids of a list of the document, in the order of the ids."""
    _check_ids(where, name, entries)
    return {value: number for number, value in enumerate(sorted(entry["id"] for entry in entries), 1)}


def _check_ids(where: str, name: str, entries: Sequence[dict[str, Any]]) -> None:
    """The ids of a list of the document must all be different, and all numbers or all text."""
    ids: set[Any] = set()
    for entry in entries:
        if entry["id"] in ids:
            raise UserError(f"{where}: `{name}` has the id {shown(repr(entry['id']))} twice; ids must be unique")
        ids.add(entry["id"])
    texts = [value for value in ids if isinstance(value, str)]
    if texts and len(texts) < len(ids):
        raise UserError(f"{where}: `{name}` has ids of numbers and of text ({shown(repr(texts[0]))}); use one of them")


def _check_keys(name: str, entry: Any, keys: tuple[str, ...]) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{name}: must be an object with {', '.join(keys)}, not {type(entry).__name__}")
    for key in keys:
        if key not in entry:
            raise UserError(f"{name}: `{key}` is missing")


def _check_place(name: str, entry: dict[str, Any], images: dict[Any, int], categories: dict[Any, int]) -> None:
    for key, known in (("image_id", images), ("category_id", categories)):
        value = entry[key]
        if identifier(value) is not None or value not in known:
            told = shown(repr(value))
            raise UserError(f"{name}: {key} {told} is not in the annotation file; are the two of the same dataset?")


def _check_box(name: str, entry: dict[str, Any]) -> None:
    box = entry["bbox"]
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(is_finite, box)):
        raise UserError(f"{_of(name, entry)}: bbox is {shown(repr(box))}, it must be 4 finite numbers x, y, w, h")
    if box[2] < 0 or box[3] < 0:
        raise UserError(f"{_of(name, entry)}: bbox {shown(repr(box))} has a negative width or height")


def _check_keypoints(name: str, entry: dict[str, Any]) -> None:
    points = entry["keypoints"]
    if not isinstance(points, list) or len(points) != KEYPOINT_NUMBERS or not all(map(is_finite, points)):
        raise UserError(
            f"{_of(name, entry)}: keypoints must be {KEYPOINT_NUMBERS} finite numbers, x, y, v of 17 points"
        )


def _check_run_lengths(name: str, entry: dict[str, Any], size: list[int], *, may_be_plain: bool = False) -> None:
    """A mask must be run lengths as pycocotools makes them; those of the ground truth may be a list of numbers."""
    mask = entry["segmentation"]
    kinds = (str, bytes, list) if may_be_plain else (str, bytes)
    if not isinstance(mask, dict) or not isinstance(mask.get("counts"), kinds) or not mask["counts"]:
        wanted = "polygons or run lengths" if may_be_plain else "compressed run lengths"
        raise UserError(f"{_of(name, entry)}: segmentation must be {wanted} (an object with size and counts)")
    if list(mask.get("size") or ()) != size:
        raise UserError(
            f"{_of(name, entry)}: segmentation is of the size {shown(repr(mask.get('size')))} (height, width), its "
            f"image of {size}"
        )
    runs = mask["counts"] if isinstance(mask["counts"], list) else _runs(mask["counts"])
    if not all(type(run) is int and run >= 0 for run in runs) or sum(runs) != size[0] * size[1]:
        raise UserError(f"{_of(name, entry)}: the run lengths of segmentation do not give an image of {size}")


def _runs(counts: str | bytes) -> list[int]:
    """The run lengths that a text of COCO's holds: 5 bits and a sign a letter, from the third on as differences.

    Where it is cut off, or no such text, they do not add up.
    """
    letters = counts.encode("utf-8", "replace") if isinstance(counts, str) else counts
    runs: list[int] = []
    value, shift = 0, 0
    for letter in letters:
        bits = letter - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    return runs if shift == 0 else []


def _is_polygons(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(
        isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 and all(map(is_finite, polygon))
        for polygon in value
    )  # fmt: skip


def _of(name: str, entry: dict[str, Any]) -> str:
    return f"{name} (image {shown(entry['image_id'])})"
