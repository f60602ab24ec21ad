"""Detections of a checkpoint, and their score: pycocotools' numbers, to the last digit.

`detect` runs the network over batches of a split; `score` compares detections with ground truth. Both need nothing of
Ray: a job hands `detect` a share of `eval_batches` and puts the shares together with `sort_detections`.
"""

import contextlib
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.checkpoint.save import MODEL, STATE, read_state
from pipeline.config.sections import EvaluateSection, differences
from pipeline.data.loader import EvalLoader, eval_batches
from pipeline.data.manifest import Manifest, ground_truth
from pipeline.errors import UserError
from pipeline.files import make_folder, write_json
from pipeline.log import get_logger
from pipeline.predict.detector import detector_in
from pipeline.shard.coco import LabelMap, OnError

logger = get_logger(__name__)

Detection = dict[str, Any]
"""One entry of COCO's result format: image_id, category_id, bbox (xywh pixels), score."""

METRICS_FILE = "metrics.json"
DETECTIONS_FILE = "detections.json"
SCORE_SETTINGS = ("batch_size", "short_side", "max_side", "max_detections")
"""Settings of the evaluate section that the numbers depend on."""

METRICS: dict[str, tuple[str, float | None, str, int]] = {
    "AP": ("precision", None, "all", 100),
    "AP50": ("precision", 0.5, "all", 100),
    "AP75": ("precision", 0.75, "all", 100),
    "APs": ("precision", None, "small", 100),
    "APm": ("precision", None, "medium", 100),
    "APl": ("precision", None, "large", 100),
    "AR1": ("recall", None, "all", 1),
    "AR10": ("recall", None, "all", 10),
    "AR100": ("recall", None, "all", 100),
    "ARs": ("recall", None, "small", 100),
    "ARm": ("recall", None, "medium", 100),
    "ARl": ("recall", None, "large", 100),
}
"""COCO's twelve numbers: what is averaged, at which IoU (None: 0.50 to 0.95), size of object, most detections."""


def detect(
    checkpoint: Path,
    manifest: Manifest,
    batches: Sequence[Sequence[int]],
    evaluate: EvaluateSection,
    device: torch.device | str,
    on_batch: Callable[[int], None] | None = None,
    on_error: OnError = "fail",
) -> list[Detection]:
    """Run a checkpoint's network over batches of a split.

    Args:
        checkpoint: folder of a checkpoint, or of a detector that was saved.
        manifest: the split.
        batches: indices into `manifest.samples`, as `eval_batches` gives them, or a share of those.
        evaluate: sizes and the number of detections of an image.
        device: where the network runs.
        on_batch: called after each batch with its number of images.
        on_error: whether an image that cannot be read is an error or has no detections.

    Returns:
        At most `max_detections` an image, original category ids, boxes in original pixels, not clipped; sorted as by
        `sort_detections`.

    Raises:
        UserError: the split's categories are not the checkpoint's.
        FloatingPointError: the network gives numbers that are not finite.
    """
    detector = detector_in(checkpoint, evaluate, device)
    if detector.labels != manifest.labels:
        raise UserError(
            f"{checkpoint} was trained on other categories ({_told(detector.labels)}) than {manifest.folder} has "
            f"({_told(manifest.labels)}); evaluate it on the validation split of its own dataset"
        )
    detections: list[Detection] = []
    for pixels, image_ids, sizes in EvalLoader(manifest, [list(batch) for batch in batches], evaluate, 0, on_error):
        found = detector.detect(pixels.to(device), sizes)
        for image_id, entries in zip(image_ids, found, strict=True):
            detections.extend({"image_id": int(image_id), **entry} for entry in entries)
        if on_batch is not None:
            on_batch(len(image_ids))
    return sort_detections(detections)


def _told(labels: LabelMap) -> str:
    names = list(labels.names.values())
    return f"{len(names)}, {labels.kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"


def sort_detections(detections: list[Detection]) -> list[Detection]:
    """Sort by image id, then score (highest first), category and box: the same file whoever made which share."""
    return sorted(detections, key=lambda d: (d["image_id"], -d["score"], d["category_id"], d["bbox"]))


DetectAll = Callable[[Path, list[list[int]]], Iterable[list[Detection]]]
"""Gives the detections of a checkpoint for batches of a split, in any shares: in `jobs/` those of Ray tasks."""


def evaluate_checkpoint(
    checkpoint: Path, manifest: Manifest, evaluate: EvaluateSection, folder: Path, detect_all: DetectAll
) -> tuple[dict[str, Any], bool]:
    """Write a checkpoint's detections.json and metrics.json into a folder, unless they are there.

    Args:
        checkpoint: folder of the checkpoint, or of a detector that was saved, which has no step.
        manifest: the validation split.
        evaluate: settings.
        folder: of the results; metrics.json is written last.
        detect_all: runs the network over all batches.

    Returns:
        The metrics (what `score` gives, with "step", "checkpoint" and "inputs", which tell what was scored), and
        whether they are new.

    Raises:
        UserError: the folder holds the scores of the same checkpoint under other settings.
    """
    inputs = {
        "weights": weights_digest(checkpoint),
        "val_digest": manifest.digest,
        "settings": {name: getattr(evaluate, name) for name in SCORE_SETTINGS},
    }
    known = _known_metrics(folder / METRICS_FILE, inputs)
    if known is not None:
        return known, False
    batches = eval_batches(manifest, evaluate.batch_size)
    detections = sort_detections([entry for share in detect_all(checkpoint, batches) for entry in share])
    metrics = score(ground_truth(manifest), detections)
    step = read_state(checkpoint).step if (checkpoint / STATE).is_file() else None
    metrics = {"step": step, "checkpoint": str(checkpoint), "inputs": inputs, **metrics}
    write_json(folder / DETECTIONS_FILE, detections, indent=None)
    write_json(folder / METRICS_FILE, metrics)
    return metrics, True


def weights_digest(checkpoint: Path) -> str:
    """Return the sha256 of a checkpoint's weights."""
    with (checkpoint / MODEL).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _known_metrics(path: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Return the metrics that are there, if they are those of `inputs`; other weights or data are scored anew."""
    if not path.is_file():
        return None
    known = _read_json(path, "metrics file")
    before = known.get("inputs", {}) if isinstance(known, dict) else {}
    if any(before.get(key) != inputs[key] for key in ("weights", "val_digest")):
        return None
    changed = differences(before.get("settings", {}), inputs["settings"])
    if changed:
        raise UserError(
            f"{path.parent} was scored with other settings of evaluate ({'; '.join(changed)}): give the run another "
            "name, take the settings back, or delete that folder"
        )
    return dict(known)


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


def evaluate_files(annotations: Path, detections: Path, out: Path) -> dict[str, Any]:
    """Score a file of detections against a COCO annotation file and write `<out>/metrics.json`.

    Returns:
        What `score` does.

    Raises:
        UserError: naming the file and the entry that cannot be used, or `out` if it cannot be made.
    """
    metrics = score(annotations, detections)
    make_folder(out)
    write_json(out / METRICS_FILE, metrics)
    return metrics


def _metrics(evaluation: COCOeval, categories: slice) -> dict[str, float]:
    """Return the twelve numbers of some categories (indices in the order of the ids), as COCOeval.summarize does."""
    return {name: _metric(evaluation, categories, *settings) for name, settings in METRICS.items()}


def _metric(evaluation: COCOeval, categories: slice, kind: str, iou: float | None, area: str, most: int) -> float:
    if not evaluation.eval:
        return -1.0
    params = evaluation.params
    # precision [iou, recall, category, area, most], recall [iou, category, area, most]
    values: NDArray[np.float64] = evaluation.eval[kind]
    if iou is not None:
        values = values[np.where(iou == params.iouThrs)[0]]
    values = values[..., categories, [params.areaRngLbl.index(area)], [params.maxDets.index(most)]]
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


def _read_json(path: Path, what: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the {what}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: the {what} is not JSON ({error})") from error


def _ground_truth(source: dict[str, Any] | Path) -> dict[str, Any]:
    """Return a copy of the document with what pycocotools needs, as it writes into the annotations."""
    where = str(source) if isinstance(source, Path) else "ground truth"
    document = _read_json(source, "annotation file") if isinstance(source, Path) else source
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
    entries = _read_json(source, "detections file") if isinstance(source, Path) else source
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
