"""Reads COCO JSON, and refuses or cleans what is wrong with it.

`clean(open_source(annotations, images), on_error)` gives a `CocoSplit`: images sorted by id, each with its annotations.
What a rule of `RULES` finds stops the reading with one `UserError` (on_error="fail"), or is cleaned and counted
("skip"). What is not COCO at all is always an error.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.data.labels import Category
from pipeline.errors import UserError

OnError = Literal["fail", "skip"]

BORDER_SLACK = 1.0
"""Pixels that a box may stick out of its image, as rounding makes it: training clips it, nothing is reported."""


RULES: dict[str, str] = {
    "image_missing": "leave the image out",
    "image_truncated": "leave the image out",
    "image_unreadable": "leave the image out",
    "image_size_mismatch": "leave the image out",
    "duplicate_image_id": "keep the first one",
    "duplicate_annotation_id": "keep the first one",
    "annotation_of_unknown_image": "leave the annotation out",
    "annotation_of_unknown_category": "leave the annotation out",
    "box_malformed": "leave the annotation out",
    "box_not_finite": "leave the annotation out",
    "box_without_area": "leave the annotation out",
    "box_outside_image": "leave the annotation out",
    "box_partly_outside_image": "clip the box",
    "area_not_finite": "use the area of the box",
}
"""Every rule for input that is wrong and can be cleaned, with what `dataset.on_error: skip` does."""


class Findings:
    """Applies `on_error` to what the rules find: raises, or counts."""

    def __init__(self, on_error: OnError) -> None:
        self.on_error = on_error
        self.counts: Counter[str] = Counter()

    def report(self, rule: str, message: str) -> None:
        """Raises `UserError` when on_error is "fail"; otherwise counts, and the caller cleans."""
        if self.on_error == "fail":
            raise UserError(f"{message}. Mend the data, or set dataset.on_error: skip to {RULES[rule]}.")
        self.counts[rule] += 1


@dataclass(frozen=True)
class CocoImage:
    """An image of a split.

    Its annotations hold id, image_id, category_id, bbox (xywh pixels), area, iscrowd, and segmentation where the source
    has one.
    """

    id: int
    file_name: str
    path: Path
    width: int
    height: int
    bytes: int
    annotations: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class CocoSplit:
    """A split that passed the rules: images sorted by id."""

    source: Path
    digest: str
    categories: tuple[Category, ...]
    images: tuple[CocoImage, ...]
    problems: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A parsed annotation file and the sizes of its images' files (None where a file is missing)."""

    path: Path
    document: dict[str, Any]
    sizes: dict[str, int | None]
    images: Path
    digest: str


def open_source(annotations: Path, images: Path) -> Source:
    """Parses the annotation file and takes the digest of the source; judges only the structure."""
    content = _read(annotations)
    document = _parse(annotations, content)
    if not images.is_dir():
        raise UserError(f"{images}: no such folder of images; set dataset.root or the split's images")
    sizes = _file_sizes(images, {image["file_name"] for image in document["images"]})
    return Source(annotations, document, sizes, images, source_digest(content, sizes))


def source_digest(annotations: bytes, sizes: Mapping[str, int | None]) -> str:
    """The hex sha256 of a source: its annotation file's sha256, and the sorted names and sizes of its images."""
    digest = hashlib.sha256(hashlib.sha256(annotations).digest())
    for name in sorted(sizes):
        digest.update(f"{name}\0{sizes[name]}\n".encode())
    return digest.hexdigest()


def clean(source: Source, on_error: OnError) -> CocoSplit:
    """Applies the rules to a source: everything but the content of the image files, which `shards` checks."""
    findings = Findings(on_error)
    categories = _categories(source)
    declared, images = _images(source, findings)
    annotations = _annotations(source, declared, {category.id for category in categories}, findings)
    split = tuple(
        CocoImage(
            id=image_id,
            file_name=image["file_name"],
            path=source.images / image["file_name"],
            width=int(image["width"]),
            height=int(image["height"]),
            bytes=source.sizes[image["file_name"]] or 0,
            annotations=tuple(annotations.get(image_id, ())),
        )
        for image_id, image in sorted(images.items())
    )
    if not split:
        raise UserError(f"{source.path}: none of its {len(declared)} images is in {source.images}; check the folder")
    return CocoSplit(source.path, source.digest, categories, split, dict(sorted(findings.counts.items())))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such annotation file; set dataset.root or the split's annotations to a COCO JSON file"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    """The document, when it has COCO's lists and every entry has the keys that the rules rely on."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}; it must be a COCO instances file") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: not COCO: the top is a {type(document).__name__}, not an object with `images`")
    required: dict[str, dict[str, str]] = {
        "images": {"id": "index", "file_name": "text", "width": "size", "height": "size"},
        "annotations": {"id": "integer", "image_id": "integer", "category_id": "integer", "bbox": "any"},
        "categories": {"id": "integer", "name": "text"},
    }
    for name, keys in required.items():
        if not isinstance(document.get(name), list):
            state = "missing" if name not in document else "not a list"
            raise UserError(f"{path}: not COCO: the list `{name}` is {state}; it must be a COCO instances file")
        for position, entry in enumerate(document[name]):
            _check_entry(path, f"{name}[{position}]", entry, keys)
    for name in ("images", "categories"):
        if not document[name]:
            raise UserError(f"{path}: `{name}` is empty; a split needs at least one entry")
    return document


def _check_entry(path: Path, where: str, entry: Any, keys: Mapping[str, str]) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{path}: not COCO: {where} is a {type(entry).__name__}, not an object")
    for key, kind in keys.items():
        if key not in entry:
            raise UserError(f"{path}: not COCO: {where} has no `{key}`")
        value = entry[key]
        if kind == "any" or (kind == "text" and isinstance(value, str) and value):
            continue
        if kind == "text":
            raise UserError(f"{path}: not COCO: {where} has `{key}` {value!r}, it must be text")
        whole = type(value) is int or (isinstance(value, float) and value.is_integer())
        if not whole:
            raise UserError(f"{path}: not COCO: {where} has `{key}` {value!r}, it must be a whole number")
        if kind == "size" and value < 1:
            raise UserError(f"{path}: {where} has `{key}` {value}, it must be at least 1 pixel")
        if kind == "index" and not 0 <= value < 10**12:
            raise UserError(f"{path}: {where} has `{key}` {value}, it must be in 0..10^12-1 (12 digits name a sample)")


def _file_sizes(folder: Path, names: set[str]) -> dict[str, int | None]:
    sizes: dict[str, int | None] = {}
    for name in names:
        try:
            status = os.stat(folder / name)
        except (OSError, ValueError):
            sizes[name] = None
        else:
            sizes[name] = status.st_size
    return sizes


def _categories(source: Source) -> tuple[Category, ...]:
    names: dict[int, str] = {}
    for entry in source.document["categories"]:
        category_id = int(entry["id"])
        if category_id in names:
            raise UserError(
                f"{source.path}: category id {category_id} is given twice ({names[category_id]}, {entry['name']}); "
                "give each category its own id"
            )
        names[category_id] = entry["name"]
    return tuple(Category(category_id, names[category_id]) for category_id in sorted(names))


def _images(source: Source, findings: Findings) -> tuple[dict[int, Any], dict[int, Any]]:
    """All images by id, and those whose file is there."""
    declared: dict[int, Any] = {}
    for image in source.document["images"]:
        image_id = int(image["id"])
        if image_id in declared:
            findings.report(
                "duplicate_image_id",
                f"{source.path}: image id {image_id} is given twice "
                f"({declared[image_id]['file_name']}, {image['file_name']})",
            )
            continue
        declared[image_id] = image
    present: dict[int, Any] = {}
    for image_id, image in declared.items():
        if source.sizes[image["file_name"]] is None:
            findings.report(
                "image_missing", f"{source.images / image['file_name']}: image {image_id} of {source.path} is missing"
            )
            continue
        present[image_id] = image
    return declared, present


def _annotations(
    source: Source, images: Mapping[int, Any], category_ids: set[int], findings: Findings
) -> dict[int, list[dict[str, Any]]]:
    """The cleaned annotations by image id, in the order of the file."""
    cleaned: dict[int, list[dict[str, Any]]] = {}
    seen: set[int] = set()
    for entry in source.document["annotations"]:
        annotation_id, image_id = int(entry["id"]), int(entry["image_id"])
        where = f"{source.path}: annotation {annotation_id} of image {image_id}"
        if annotation_id in seen:
            findings.report("duplicate_annotation_id", f"{where}: its id is given twice")
            continue
        seen.add(annotation_id)
        image = images.get(image_id)
        if image is None:
            findings.report("annotation_of_unknown_image", f"{where}: there is no image with this id")
            continue
        where = f"{where} ({image['file_name']})"
        if int(entry["category_id"]) not in category_ids:
            findings.report("annotation_of_unknown_category", f"{where}: there is no category {entry['category_id']}")
            continue
        annotation = _annotation(entry, int(image["width"]), int(image["height"]), where, findings)
        if annotation is not None:
            cleaned.setdefault(image_id, []).append(annotation)
    return cleaned


def _annotation(
    entry: Mapping[str, Any], width: int, height: int, where: str, findings: Findings
) -> dict[str, Any] | None:
    box = _box(entry["bbox"], width, height, where, findings)
    if box is None:
        return None
    clipped = box != entry["bbox"]
    box_area = box[2] * box[3]
    area = entry.get("area", box_area)
    if not _is_number(area) or not math.isfinite(area):
        findings.report("area_not_finite", f"{where}: its area is {area!r}")
        area = box_area
    annotation = {
        "id": int(entry["id"]),
        "image_id": int(entry["image_id"]),
        "category_id": int(entry["category_id"]),
        "bbox": box,
        "area": min(area, box_area) if clipped else area,
        "iscrowd": int(bool(entry.get("iscrowd", 0))),
    }
    if entry.get("segmentation"):
        annotation["segmentation"] = entry["segmentation"]
    return annotation


def _box(box: Any, width: int, height: int, where: str, findings: Findings) -> list[Any] | None:
    """The box xywh, clipped to the image when it sticks out by more than the slack; None when it has to go."""
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        findings.report("box_malformed", f"{where}: its bbox {box!r} is not [x, y, width, height] in pixels")
        return None
    if not all(math.isfinite(value) for value in box):
        findings.report("box_not_finite", f"{where}: its bbox {box} is not finite")
        return None
    x, y, box_width, box_height = box
    if box_width <= 0 or box_height <= 0:
        findings.report("box_without_area", f"{where}: its bbox {box} has no area")
        return None
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + box_width, width), min(y + box_height, height)
    if right <= left or bottom <= top:
        findings.report("box_outside_image", f"{where}: its bbox {box} is outside the image of {width}x{height}")
        return None
    overhang = max(-x, -y, x + box_width - width, y + box_height - height)
    if overhang <= BORDER_SLACK:
        return box
    findings.report("box_partly_outside_image", f"{where}: its bbox {box} sticks out of the image of {width}x{height}")
    return [left, top, right - left, bottom - top]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
