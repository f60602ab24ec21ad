"""Reads COCO JSON, and refuses or cleans what is wrong with it.

`clean(open_source(annotations, images), on_error)` gives a `CocoSplit`: images sorted by id, each with its annotations.
What a rule of `findings.RULES` finds stops the reading with one `UserError` (on_error="fail"), or is cleaned, counted
and listed ("skip"). What is not COCO at all is always an error.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple

from pipeline.config.sections import DatasetSection, OnError, SplitSection
from pipeline.data.images import BadImageError
from pipeline.data.labels import Category
from pipeline.errors import UserError, shown
from pipeline.shard.document import (
    anything,
    check_document,
    crowd,
    image_id,
    is_finite,
    is_number,
    is_whole,
    pixels,
    read_large_document,
    text,
    whole,
)
from pipeline.shard.findings import Findings, Where
from pipeline.shard.origin import Images, open_images
from pipeline.store import Place

BORDER_SLACK = 1.0
"""Pixels that a box may stick out of its image, as rounding makes it: training clips it, nothing is reported."""

NEEDS = {
    "images": {"id": image_id, "file_name": text, "width": pixels, "height": pixels},
    "annotations": {"image_id": whole, "category_id": whole, "bbox": anything},
    "categories": {"id": whole, "name": text},
}
"""What an entry must have; the annotations' ids have rules of their own."""


class CocoImage(NamedTuple):
    """An image of a split; `size` is the bytes of its file, `annotations_json` the text of its annotations."""

    id: int
    file_name: str
    width: int
    height: int
    size: int
    annotations_json: bytes
    original: tuple[int, int] | None = None
    """(width, height) of the image that this is a smaller copy of."""

    @property
    def annotations(self) -> list[dict[str, Any]]:
        """Each with id, image_id, category_id, bbox (xywh pixels), area, iscrowd, and segmentation if it is kept."""
        return json.loads(self.annotations_json)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class CocoSplit:
    """A split that passed the rules: images sorted by id."""

    source: Place
    files: Images
    digest: str
    categories: tuple[Category, ...]
    images: tuple[CocoImage, ...]
    problems: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Messages of the first problems of each rule."""
    packed: bytes = b""
    """The problems one by one, of `Findings`."""


@dataclass(frozen=True)
class Source:
    """A parsed annotation file and the sizes of its images' files (None where a file is missing)."""

    path: Place
    document: dict[str, Any]
    sizes: dict[str, int | None]
    files: Images
    digest: str


def open_source(annotations: Place, images: Place, *, allow_outside: bool = False) -> Source:
    """Parses the annotation file and takes the digest of the source; judges only the structure.

    Args:
        annotations: COCO JSON file, packed by gzip or not.
        images: folder of the images, or a zip or tar archive of them.
        allow_outside: let names of files lead out of that folder.

    Raises:
        UserError: the file is not COCO, there is no such folder, or a file's name leads out of it.
    """
    mend = "; set dataset.root or the split's annotations to a COCO JSON file"
    if not annotations.exists():
        raise UserError(f"{annotations}: no such annotation file{mend}")
    content, document = read_large_document(annotations, "annotation file", mend)
    check_document(str(annotations), document, NEEDS)
    for name in ("images", "categories"):
        if not document[name]:
            raise UserError(f"{annotations}: `{name}` is empty; a split needs at least one entry")
    opened = open_images(images)
    names = {image["file_name"] for image in document["images"]}
    outside = None if allow_outside else opened.outside(names)
    if outside is not None:  # a foreign annotation file must not have other files of this machine copied into shards
        raise UserError(
            f"{annotations}: the file_name {shown(repr(outside))} leads out of {images}; mend it, or set "
            "dataset.allow_outside: true if you trust this file"
        )
    sizes = opened.sizes(names)
    return Source(annotations, document, sizes, opened, source_digest(content, sizes))


def open_split(dataset: DatasetSection, split: SplitSection) -> Source:
    """The configured source of a split; errors as of `open_source`."""
    root = dataset.place
    return open_source(root / split.annotations, root / split.images, allow_outside=dataset.allow_outside)


def source_digest(annotations: bytes, sizes: Mapping[str, int | None]) -> str:
    """The hex sha256 of a source: its annotation file's sha256, and the sorted names and sizes of its images."""
    digest = hashlib.sha256(hashlib.sha256(annotations).digest())
    for name in sorted(sizes):
        digest.update(f"{name}\0{sizes[name]}\n".encode())
    return digest.hexdigest()


def clean(source: Source, on_error: OnError, *, segmentations: bool = True) -> CocoSplit:
    """Applies the rules to a source: everything but the content of the image files, which `shards` checks.

    Args:
        source: the opened annotation file.
        on_error: whether what a rule finds stops this, or is cleaned and counted.
        segmentations: keep those of the annotations.

    Raises:
        UserError: what is wrong, or cannot be cleaned.
    """
    findings = Findings(on_error)
    categories = _categories(source)
    declared = _declared(source, findings)
    merged = _merged(source, declared, findings)
    images = _present(source, declared, merged, findings)
    category_ids = {category.id for category in categories}
    annotations = _annotations(source, declared, merged, category_ids, segmentations, findings)
    split = tuple(
        CocoImage(
            id=image_id,
            file_name=image["file_name"],
            width=int(image["width"]),
            height=int(image["height"]),
            size=source.sizes[image["file_name"]] or 0,
            annotations_json=b"[%b]" % bytes(annotations.pop(image_id, b"")),
        )
        for image_id, image in sorted(images.items())
    )
    if not split:
        raise UserError(f"{source.path}: none of its {len(declared)} images is in {source.files}; check the folder")
    problems = dict(sorted(findings.counts.items()))
    return CocoSplit(source.path, source.files, source.digest, categories, split, problems, findings.examples,
                     findings.packed)  # fmt: skip


def _categories(source: Source) -> tuple[Category, ...]:
    names: dict[int, str] = {}
    for entry in source.document["categories"]:
        category_id = int(entry["id"])
        if category_id in names:
            raise UserError(
                f"{source.path}: category id {category_id} is given twice ({shown(names[category_id])}, "
                f"{shown(entry['name'])}); "
                "give each category its own id"
            )
        names[category_id] = entry["name"]
    return tuple(Category(category_id, names[category_id]) for category_id in sorted(names))


def _declared(source: Source, findings: Findings) -> dict[int, Any]:
    """The images by id, whether or not their files are there."""
    declared: dict[int, Any] = {}
    for image in source.document["images"]:
        number = int(image["id"])
        if number in declared:
            names = f"{shown(declared[number]['file_name'])}, {shown(image['file_name'])}"
            where = Where(source.path, image["file_name"], number)
            findings.report("duplicate_image_id", where, f"its id is given twice ({names})")
            continue
        declared[number] = image
    return declared


def _merged(source: Source, declared: Mapping[int, Any], findings: Findings) -> dict[int, int]:
    """The ids of pictures that an id before them has, too, with that one: each has but a part of the objects."""
    first: dict[str, int] = {}
    merged: dict[int, int] = {}
    for number, image in declared.items():
        same = first.setdefault(os.path.normpath(image["file_name"]), number)
        if same != number:
            findings.report(
                "image_under_two_ids",
                Where(source.path, image["file_name"], number),
                f"{shown(image['file_name'])} is given under the image ids {same} and {number}",
            )
            merged[number] = same
    return merged


def _present(
    source: Source, declared: Mapping[int, Any], merged: Mapping[int, int], findings: Findings
) -> dict[int, Any]:
    """The images whose file is there, each under one id."""
    present: dict[int, Any] = {}
    for number, image in declared.items():
        name = image["file_name"]
        if number in merged:
            continue
        if source.sizes[name] is None:
            rule, told = _missing(source.files, name)
            findings.report(rule, Where(source.files.where(name), name, number), told)
            continue
        present[number] = image
    return present


def _missing(images: Images, name: str) -> tuple[str, str]:
    """The rule that a file without a size breaks, and its message."""
    try:
        images.read(name)
    except BadImageError as error:
        return error.rule, f"it cannot be read: {error}"
    except (OSError, ValueError):
        pass
    return "image_missing", "it is missing"


def _annotations(
    source: Source,
    images: Mapping[int, Any],
    merged: Mapping[int, int],
    category_ids: set[int],
    segmentations: bool,
    findings: Findings,
) -> dict[int, bytearray]:
    """The text of the cleaned annotations by image id, in the order of the file.

    Text, since ten million of them as values take more memory than a machine has to spare.
    """
    cleaned: dict[int, bytearray] = {}
    below = boxes = 0
    ids = _AnnotationIds(source.document["annotations"], findings)
    for position, entry in enumerate(source.document["annotations"]):
        number = int(entry["image_id"])
        own = entry.get("id")
        image = images.get(number)
        where = Where(source.path, image and image["file_name"], number, position, own)
        if image is None:
            findings.report("annotation_of_unknown_image", where, "there is no image with this id")
            continue
        if int(entry["category_id"]) not in category_ids:
            findings.report("annotation_of_unknown_category", where, f"there is no category {entry['category_id']}")
            continue
        annotation = _annotation(entry, int(image["width"]), int(image["height"]), where, findings)
        if annotation is not None:
            number = merged.get(number, number)
            if not segmentations:
                annotation.pop("segmentation", None)
            annotation = {"id": ids.unique(own, where), "image_id": number, **annotation}
            told = cleaned.setdefault(number, bytearray())
            told += b"," if told else b""
            told += to_json(annotation)
            boxes += 1
            below += annotation["bbox"][2] < 1 and annotation["bbox"][3] < 1
    if 2 * below > boxes:  # they would be trained on as objects below a pixel
        raise UserError(
            f"{source.path}: {below} of its {boxes} boxes are smaller than a pixel: COCO's bbox is "
            "[x, y, width, height] in pixels; if these are fractions of the image, multiply them by its size"
        )
    return cleaned


def to_json(value: dict[str, Any]) -> bytes:
    """The text of a value in a shard: the same bytes for the same value."""
    return _json.encode(value).encode()


_json = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


class _AnnotationIds:
    """Keeps annotations' ids unique: an object whose id is missing or taken is an object all the same."""

    def __init__(self, annotations: Iterable[dict[str, Any]], findings: Findings) -> None:
        self._annotations = annotations
        self._taken: set[int] = set()
        self._findings = findings

    @cached_property
    def _new(self) -> Iterator[int]:
        known = [int(entry["id"]) for entry in self._annotations if is_whole(entry.get("id"))]
        return count(max(known, default=0) + 1)

    def unique(self, value: Any, where: Where) -> int:
        """The id, or a new one."""
        if not is_whole(value):
            told = "it has no id" if value is None else f"its id is {shown(repr(value))}, not a whole number"
            self._findings.report("annotation_id_missing", where, told)
            return next(self._new)
        if int(value) in self._taken:
            self._findings.report("duplicate_annotation_id", where, "its id is given twice")
            return next(self._new)
        self._taken.add(int(value))
        return int(value)


def _annotation(
    entry: Mapping[str, Any], width: int, height: int, where: Where, findings: Findings
) -> dict[str, Any] | None:
    """What an annotation holds but its ids; None when it has to go."""
    box = _box(entry["bbox"], width, height, where, findings)
    if box is None:
        return None
    is_crowd = crowd(entry.get("iscrowd"))
    if is_crowd is None:
        told = shown(repr(entry["iscrowd"]))
        findings.report("crowd_unclear", where, f"its iscrowd is {told}, it must be 0 or 1")
        return None
    clipped = box != entry["bbox"]
    box_area = box[2] * box[3]
    area = entry.get("area", box_area)
    if not is_finite(area) or area < 0:
        findings.report("area_not_finite", where, f"its area is {shown(repr(area))}")
        area = box_area
    annotation = {
        "category_id": int(entry["category_id"]),
        "bbox": box,
        "area": min(area, box_area) if clipped else area,
        "iscrowd": is_crowd,
    }
    if entry.get("segmentation"):
        annotation["segmentation"] = entry["segmentation"]
    return annotation


def _box(box: Any, width: int, height: int, where: Where, findings: Findings) -> list[Any] | None:
    """The box xywh, clipped to the image when it sticks out by more than the slack; None when it has to go."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_finite, box)):
        if isinstance(box, list) and len(box) == 4 and all(map(is_number, box)):
            findings.report("box_not_finite", where, f"its bbox {shown(box)} is not finite")
        else:
            told = f"its bbox {shown(repr(box))} is not [x, y, width, height] in pixels"
            findings.report("box_malformed", where, told)
        return None
    x, y, box_width, box_height = box
    if box_width <= 0 or box_height <= 0:
        findings.report("box_without_area", where, f"its bbox {shown(box)} has no area")
        return None
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + box_width, width), min(y + box_height, height)
    if right <= left or bottom <= top:
        findings.report("box_outside_image", where, f"its bbox {shown(box)} is outside the image of {width}x{height}")
        return None
    overhang = max(-x, -y, x + box_width - width, y + box_height - height)
    if overhang <= BORDER_SLACK:
        return box
    findings.report(
        "box_partly_outside_image", where, f"its bbox {shown(box)} sticks out of the image of {width}x{height}"
    )
    return [left, top, right - left, bottom - top]
