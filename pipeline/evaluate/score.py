"""The score of detections: pycocotools' numbers, to the last digit."""

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.config.sections import METRICS, Metric
from pipeline.errors import UserError, shown
from pipeline.evaluate.detect import Detection
from pipeline.log import get_logger
from pipeline.shard.document import (
    anything,
    check_document,
    check_entry,
    crowd,
    identifier,
    is_finite,
    read_document,
    text,
)

logger = get_logger(__name__)

NEEDS = {
    "images": {"id": identifier},
    "annotations": {"id": identifier, "image_id": identifier, "category_id": identifier, "bbox": anything},
    "categories": {"id": identifier},
}
"""What an entry of the ground truth must have."""

_AREAS = {"s": "small", "m": "medium", "l": "large"}
_DETECTIONS = 100
"""Most detections of an image that count, where a metric's name does not say."""


def score(truth: dict[str, Any] | Path, detections: list[Detection] | Path) -> dict[str, Any]:
    """Score detections as pycocotools does (boxes).

    Args:
        truth: a COCO document, or its file. An annotation without `iscrowd` is no crowd, one without `area` has
            that of its box. Ids are whole numbers, or all of them text.
        detections: entries of COCO's result format, or their file.

    Returns:
        AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl over all categories, and under "per_category" the same for
        each category by name; -1 where there is no object to find.

    Raises:
        UserError: naming the file and the entry that cannot be used.
    """
    document = _ground_truth(truth)
    entries = _detections(detections, document)
    with contextlib.redirect_stdout(io.StringIO()):
        expected, found = COCO(), COCO()
        expected.dataset = document
        expected.createIndex()
        found.dataset = {"images": document["images"], "categories": document["categories"], "annotations": entries}
        found.createIndex()
        evaluation = COCOeval(expected, found, "bbox")
        if document["images"]:
            evaluation.evaluate()
            evaluation.accumulate()
    metrics: dict[str, Any] = _metrics(evaluation, slice(None))
    metrics["per_category"] = {
        name: _metrics(evaluation, slice(index, index + 1)) for index, name in enumerate(_category_names(document))
    }
    return metrics


def _metrics(evaluation: COCOeval, categories: slice) -> dict[str, float]:
    """Return the twelve numbers of some categories (indices in the order of the ids), as COCOeval.summarize does."""
    return {name: _metric(evaluation, categories, name) for name in METRICS}


def _metric(evaluation: COCOeval, categories: slice, name: Metric) -> float:
    """Return a number by its name: precision (AP) or recall (AR), then an IoU in percent, a number of detections or
    the size of object; without, over IoU 0.50 to 0.95, 100 detections and all sizes.
    """
    if not evaluation.eval:
        return -1.0
    kind, suffix = name[:2], name[2:]
    params = evaluation.params
    # precision [iou, recall, category, area, most], recall [iou, category, area, most]
    values: NDArray[np.float64] = evaluation.eval["precision" if kind == "AP" else "recall"]
    most = _DETECTIONS
    if suffix.isdigit() and kind == "AP":
        values = values[np.where(int(suffix) / 100 == params.iouThrs)[0]]
    elif suffix.isdigit():
        most = int(suffix)
    area = params.areaRngLbl.index(_AREAS.get(suffix, "all"))
    values = values[..., categories, [area], [params.maxDets.index(most)]]
    known = values[values > -1]
    return float(np.mean(known)) if known.size else -1.0


def _category_names(document: dict[str, Any]) -> list[str]:
    """Return the names in the order of the ids; one that several categories have is followed by the id."""
    categories = sorted(document["categories"], key=lambda category: category["id"])
    names = [str(category.get("name") or category["id"]) for category in categories]
    counts = Counter(names)
    return [
        f"{name} ({category['id']})" if counts[name] > 1 else name
        for name, category in zip(names, categories, strict=True)
    ]


def _ground_truth(source: dict[str, Any] | Path) -> dict[str, Any]:
    """Return a copy of the document with what pycocotools needs, as it writes into the annotations."""
    where = str(source) if isinstance(source, Path) else "ground truth"
    document = read_document(source, "annotation file")[1] if isinstance(source, Path) else source
    check_document(where, document, NEEDS, may_lack=("annotations",))
    known = {name: _ids(where, name, document.get(name, ())) for name in NEEDS}
    for index, entry in enumerate(document["categories"]):
        if entry.get("name") and isinstance(entry["name"], str):
            check_entry(where, f"categories[{index}]", entry, {"name": text})
    annotations = []
    for index, entry in enumerate(document.get("annotations", ())):
        name = f"{where}: annotation {shown(entry['id'])} (entry {index})"
        _check_values(name, entry, known["images"], known["categories"])
        is_crowd = crowd(entry.get("iscrowd"))
        if is_crowd is None:
            raise UserError(f"{name}: iscrowd is {shown(repr(entry['iscrowd']))}, it must be 0 or 1")
        area = entry.get("area", entry["bbox"][2] * entry["bbox"][3])
        if not is_finite(area):
            raise UserError(f"{name}: area is {shown(repr(area))}, it must be a finite number of square pixels")
        wanted = {key: entry[key] for key in ("id", "image_id", "category_id", "bbox")}
        annotations.append({**wanted, "area": area, "iscrowd": is_crowd})
    if 0 in known["annotations"]:
        logger.warning("%s: annotation id 0: pycocotools counts a match with it as none; number from 1", where)
    return {"images": document["images"], "categories": document["categories"], "annotations": annotations}


def _ids(where: str, name: str, entries: Sequence[dict[str, Any]]) -> set[Any]:
    """The ids of a list of the document: all different, and all numbers or all text."""
    ids: set[Any] = set()
    for entry in entries:
        if entry["id"] in ids:
            raise UserError(f"{where}: `{name}` has the id {shown(repr(entry['id']))} twice; ids must be unique")
        ids.add(entry["id"])
    texts = [value for value in ids if isinstance(value, str)]
    if texts and len(texts) < len(ids):
        raise UserError(f"{where}: `{name}` has ids of numbers and of text ({shown(repr(texts[0]))}); use one of them")
    if name == "annotations" and texts:
        raise UserError(f"{where}: `annotations` has the id {shown(repr(texts[0]))}; it must be a whole number")
    return ids


def _detections(source: list[Detection] | Path, document: dict[str, Any]) -> list[Detection]:
    """Return the checked entries as the annotations that pycocotools makes of results."""
    where = str(source) if isinstance(source, Path) else "detections"
    entries = read_document(source, "detections file")[1] if isinstance(source, Path) else source
    if not isinstance(entries, list):
        raise UserError(f"{where}: must be a list of detections (COCO's result format), not {type(entries).__name__}")
    images = {image["id"] for image in document["images"]}
    categories = {category["id"] for category in document["categories"]}
    results = []
    for index, entry in enumerate(entries):
        name = f"{where}: entry {index}"
        _check_keys(name, entry, ("image_id", "category_id", "bbox", "score"))
        _check_values(name, entry, images, categories)
        if not is_finite(entry["score"]):
            image, value = shown(entry["image_id"]), shown(repr(entry["score"]))
            raise UserError(f"{name} (image {image}): score is {value}, it must be finite")
        box = entry["bbox"]
        results.append(
            {
                "id": index + 1,
                "image_id": entry["image_id"],
                "category_id": entry["category_id"],
                "bbox": box,
                "score": entry["score"],
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
        )
    return results


def _check_keys(name: str, entry: Any, keys: tuple[str, ...]) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{name}: must be an object with {', '.join(keys)}, not {type(entry).__name__}")
    missing = [key for key in keys if key not in entry]
    if missing:
        raise UserError(f"{name}: `{missing[0]}` is missing")


def _check_values(name: str, entry: dict[str, Any], images: set[Any], categories: set[Any]) -> None:
    for key, known in (("image_id", images), ("category_id", categories)):
        value = entry[key]
        if identifier(value) is not None or value not in known:
            told = shown(repr(value))
            raise UserError(f"{name}: {key} {told} is not in the annotation file; are the two of the same dataset?")
    box, image = entry["bbox"], shown(entry["image_id"])
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(is_finite(value) for value in box):
        raise UserError(f"{name} (image {image}): bbox is {shown(repr(box))}, it must be 4 finite numbers x, y, w, h")
    if box[2] < 0 or box[3] < 0:
        raise UserError(f"{name} (image {image}): bbox {shown(repr(box))} has a negative width or height")
