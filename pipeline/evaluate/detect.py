"""Detections of a checkpoint: its network run over batches of a split.

A job hands `detect` a share of `eval_batches` and puts the shares together with `sort_detections`.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.config.sections import EvaluateSection, OnError
from pipeline.data.labels import LabelMap
from pipeline.data.loader import EvalLoader
from pipeline.data.manifest import Manifest
from pipeline.errors import UserError, shown
from pipeline.predict.detector import Detector, detector_in

Detection = dict[str, Any]
"""One entry of COCO's result format: image_id, category_id, bbox (xywh pixels), score."""


def detect(
    checkpoint: Path,
    manifest: Manifest,
    batches: Sequence[Sequence[int]],
    evaluate: EvaluateSection,
    device: torch.device | str,
    on_batch: Callable[[int], None] | None = None,
) -> list[Detection]:
    """Run a checkpoint's network over batches of a split; arguments, result and errors as of the two that it calls."""
    return detect_with(detector_for(manifest, checkpoint, evaluate, device), manifest, batches, on_batch)


def detector_for(
    manifest: Manifest, checkpoint: Path, evaluate: EvaluateSection, device: torch.device | str
) -> Detector:
    """Load a checkpoint that is to be scored on a split.

    Args:
        manifest: the split.
        checkpoint: folder of a checkpoint, or of a detector that was saved.
        evaluate: sizes, precision and the number of detections of an image.
        device: where the network runs.

    Raises:
        UserError: the split's categories are not the checkpoint's, or it is damaged.
    """
    detector = detector_in(checkpoint, evaluate, device)
    if detector.labels != manifest.labels:
        raise UserError(
            f"{checkpoint} was trained on other categories ({_told(detector.labels)}) than {manifest.folder} has "
            f"({_told(manifest.labels)}); evaluate it on the validation split of its own dataset"
        )
    return detector


def detect_with(
    detector: Detector,
    manifest: Manifest,
    batches: Sequence[Sequence[int]],
    on_batch: Callable[[int], None] | None = None,
    *,
    workers: int = 0,
    on_error: OnError = "fail",
) -> list[Detection]:
    """Run a network over batches of a split.

    Args:
        detector: as of `detector_for`.
        manifest: the split.
        batches: indices into `manifest.samples`, as `eval_batches` gives them, or a share of those.
        on_batch: called after each batch with its number of images.
        workers: processes that decode; 0 decodes here.
        on_error: whether an image that cannot be read is an error or has no detections.

    Returns:
        At most `max_detections` an image, original category ids, boxes in original pixels, not clipped; sorted as by
        `sort_detections`.

    Raises:
        UserError: the network gives numbers that are not finite, an image cannot be read, or there is too little shared
            memory for the workers.
    """
    evaluate, device = detector.evaluate, detector.device
    loader = EvalLoader(manifest, [list(batch) for batch in batches], evaluate, workers, on_error)
    detections: list[Detection] = []
    for pixels, image_ids, sizes in loader:
        with torch.autocast(device.type, torch.bfloat16, enabled=evaluate.precision == "bf16"):
            found = detector.detect(pixels.to(device), sizes)
        for image_id, entries in zip(image_ids, found, strict=True):
            detections.extend({"image_id": int(image_id), **entry} for entry in entries)
        if on_batch is not None:
            on_batch(len(image_ids))
    return sort_detections(detections)


def _told(labels: LabelMap) -> str:
    names = list(labels.names.values())
    return f"{len(names)}, {labels.kind}: {shown(', '.join(names[:5]), 400)}{', ...' if len(names) > 5 else ''}"


def sort_detections(detections: list[Detection]) -> list[Detection]:
    """Sort by image id, then score (highest first), category and box: the same file whoever made which share."""
    return sorted(detections, key=lambda d: (d["image_id"], -d["score"], d["category_id"], d["bbox"]))


DetectAll = Callable[[Path, list[list[int]]], Iterable[list[Detection]]]
"""Gives the detections of a checkpoint for batches of a split, in any shares: in `jobs/` those of Ray tasks."""
