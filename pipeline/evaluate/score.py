"""The score of detections: pycocotools' numbers, to the last digit."""

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.config.sections import METRICS, Metric
from pipeline.errors import UserError
from pipeline.evaluate.detect import Detection
from pipeline.files import read_json
from pipeline.log import get_logger

logger = get_logger(__name__)

_AREAS = {"s": "small", "m": "medium", "l": "large"}
_DETECTIONS = 100
"""Most detections of an image that count, where a metric's name does not say."""


def score(truth: dict[str, Any] | Path, detections: list[Detection] | Path) -> dict[str, Any]:
    """Score detections as pycocotools does (boxes).

    Args:
        truth: a COCO document, or its file. An annotation without `iscrowd` is no crowd, one without `area` has
            that of its box.
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
    names = [str(category.get("name", category["id"])) for category in categories]
    return [
        f"{name} ({category['id']})" if names.count(name) > 1 else name
        for name, category in zip(names, categories, strict=True)
    ]


def _ground_truth(source: dict[str, Any] | Path) -> dict[str, Any]:
    """Return a copy of the document with what pycocotools needs, as it writes into the annotations."""
    where = str(source) if isinstance(source, Path) else "ground truth"
    document = read_json(source, "annotation file") if isinstance(source, Path) else source
    if not isinstance(document, dict) or not all(isinstance(document.get(k), list) for k in ("images", "categories")):
        raise UserError(f"{where}: not a COCO annotation file: it needs the lists `images` and `categories`")
    for section in ("images", "categories"):
        ids = [entry.get("id") if isinstance(entry, dict) else None for entry in document[section]]
        if None in ids or len(set(ids)) < len(ids):
            raise UserError(f"{where}: `{section}` has an entry without an id or two with the same")
    images = {image["id"] for image in document["images"]}
    categories = {category["id"] for category in document["categories"]}
    annotations, seen = [], set()
    for index, entry in enumerate(document.get("annotations", [])):
        name = f"{where}: annotation {entry.get('id') if isinstance(entry, dict) else None} (entry {index})"
        _check_entry(name, entry, ("id", "image_id", "category_id", "bbox"), images, categories)
        if entry["id"] in seen:
            raise UserError(f"{name}: another annotation has the same id; ids must be unique")
        seen.add(entry["id"])
        area = entry.get("area", entry["bbox"][2] * entry["bbox"][3])
        if not _is_number(area):
            raise UserError(f"{name}: area is {area!r}, it must be a finite number of square pixels")
        annotations.append({**entry, "area": area, "iscrowd": entry.get("iscrowd", 0)})
    if 0 in seen:
        logger.warning("%s: annotation id 0: pycocotools counts a match with it as none; number from 1", where)
    return {"images": document["images"], "categories": document["categories"], "annotations": annotations}


def _detections(source: list[Detection] | Path, document: dict[str, Any]) -> list[Detection]:
    """Return the checked entries as the annotations that pycocotools makes of results."""
    where = str(source) if isinstance(source, Path) else "detections"
    entries = read_json(source, "detections file") if isinstance(source, Path) else source
    if not isinstance(entries, list):
        raise UserError(f"{where}: must be a list of detections (COCO's result format), not {type(entries).__name__}")
    images = {image["id"] for image in document["images"]}
    categories = {category["id"] for category in document["categories"]}
    results = []
    for index, entry in enumerate(entries):
        name = f"{where}: entry {index}"
        _check_entry(name, entry, ("image_id", "category_id", "bbox", "score"), images, categories)
        if not _is_number(entry["score"]):
            raise UserError(f"{name} (image {entry['image_id']}): score is {entry['score']!r}, it must be finite")
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


def _check_entry(name: str, entry: Any, keys: tuple[str, ...], images: set[Any], categories: set[Any]) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{name}: must be an object with {', '.join(keys)}, not {type(entry).__name__}")
    missing = [key for key in keys if key not in entry]
    if missing:
        raise UserError(f"{name}: `{missing[0]}` is missing")
    for key, known in (("image_id", images), ("category_id", categories)):
        value = entry[key]
        if not isinstance(value, int | str) or value not in known:
            raise UserError(f"{name}: {key} {value!r} is not in the annotation file; are the two of the same dataset?")
    box = entry["bbox"]
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(_is_number(value) for value in box):
        raise UserError(f"{name} (image {entry['image_id']}): bbox is {box!r}, it must be 4 finite numbers x, y, w, h")
    if box[2] < 0 or box[3] < 0:
        raise UserError(f"{name} (image {entry['image_id']}): bbox {box!r} has a negative width or height")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
