"""The results of an evaluation on disk: scored once, found again, told apart by what was scored."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checkpoint.state import MODEL, STATE, checked_sum, read_state
from pipeline.config.sections import METRICS, EvaluateSection, Role, settings_with
from pipeline.config.values import differences
from pipeline.data.loader import eval_batches
from pipeline.data.manifest import Manifest
from pipeline.data.truth import ground_truth
from pipeline.errors import UserError
from pipeline.evaluate.baseline import box_variety, constant_boxes
from pipeline.evaluate.detect import DetectAll, sort_detections
from pipeline.evaluate.documents import IouType
from pipeline.evaluate.score import score
from pipeline.files import make_folder, read_json, sha256_of, write_json
from pipeline.run_folder import METRICS_FILE

DETECTIONS_FILE = "detections.json"

SCORE_SETTINGS = settings_with(EvaluateSection, Role.SCORES)
"""Settings of the evaluate section that the numbers depend on."""


def evaluate_checkpoint(
    checkpoint: Path,
    manifest: Manifest,
    evaluate: EvaluateSection,
    folder: Path,
    detect_all: DetectAll,
    *,
    verify: bool = False,
    train: tuple[Manifest, DetectAll] | None = None,
    subset: int = 0,
) -> tuple[dict[str, Any], bool]:
    """Write a checkpoint's detections.json and metrics.json into a folder, unless they are there.

    Args:
        checkpoint: folder of the checkpoint, or of a detector that was saved, which has no step.
        manifest: the validation split.
        evaluate: settings.
        folder: of the results; metrics.json is written last.
        detect_all: runs the network over all batches.
        verify: have pycocotools compute the numbers as well, unless it has for those that are there.
        train: the training split, and what runs the network over batches of it, for `evaluate.train_sample`.
        subset: images of the validation split that are scored, always the same; 0 for all.

    Returns:
        The metrics (what `score` gives, with "step", "checkpoint" and "inputs", which tell what was scored, "verified",
        "baseline", the numbers of `constant_boxes`, "box_variety", and with `train` "train_sample", the numbers of
        those images), and whether they are new.

    Raises:
        UserError: the folder holds the scores of the same checkpoint under other settings, the checkpoint is damaged,
            or pycocotools has another number.
    """
    inputs = {
        "weights": weights_digest(checkpoint),
        "val_digest": manifest.digest,
        "settings": {name: getattr(evaluate, name) for name in SCORE_SETTINGS},
        **({"subset": subset} if subset else {}),
    }
    sample = _sample(manifest, subset) if subset else None
    known = _known_metrics(folder / METRICS_FILE, inputs)
    if known is not None and (known.get("verified") or not verify):
        return known, False
    if known is not None:
        detections = read_json(folder / DETECTIONS_FILE, "detections file")
    else:
        batches = eval_batches(manifest, evaluate.batch_size, sample)
        detections = sort_detections([entry for share in detect_all(checkpoint, batches) for entry in share])
        write_json(folder / DETECTIONS_FILE, detections, indent=None)
    truth = ground_truth(manifest, sample)
    metrics = score(truth, detections, verify=verify)
    baseline = score(truth, constant_boxes(truth))
    metrics["baseline"] = {name: baseline[name] for name in METRICS}
    metrics["box_variety"] = box_variety(truth, detections)
    if train is not None and evaluate.train_sample:
        metrics["train_sample"] = _score_sample(checkpoint, *train, evaluate)
    step = read_state(checkpoint).step if (checkpoint / STATE).is_file() else None
    metrics = {"step": step, "checkpoint": str(checkpoint), "inputs": inputs, "verified": verify, **metrics}
    write_json(folder / METRICS_FILE, metrics)
    return metrics, known is None


def _score_sample(
    checkpoint: Path, manifest: Manifest, detect_all: DetectAll, evaluate: EvaluateSection
) -> dict[str, float]:
    """The numbers of `evaluate.train_sample` images of a split."""
    indices = _sample(manifest, evaluate.train_sample)
    batches = eval_batches(manifest, evaluate.batch_size, indices)
    found = sort_detections([entry for share in detect_all(checkpoint, batches) for entry in share])
    metrics = score(ground_truth(manifest, indices), found)
    return {name: metrics[name] for name in METRICS} | {"images": len(indices)}


def _sample(manifest: Manifest, count: int) -> list[int]:
    """The indices of so many images, or of all if there are fewer, that lie evenly over a split."""
    last = len(manifest.samples) - 1
    return [int(index) for index in np.linspace(0, last, min(count, last + 1)).round()]


def weights_digest(checkpoint: Path) -> str:
    """Return the sha256 of the weights of a checkpoint, which must be as they were written, or of a saved detector.

    Raises:
        UserError: the checkpoint is damaged.
    """
    if (checkpoint / STATE).is_file():
        state = read_state(checkpoint)
        return checked_sum(checkpoint, state, state.weights)
    return sha256_of(checkpoint / MODEL)


def _known_metrics(path: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Return the metrics that are there, if they are those of `inputs`; other weights or data are scored anew."""
    if not path.is_file():
        return None
    known = read_json(path, "metrics file")
    before = known.get("inputs", {}) if isinstance(known, dict) else {}
    if any(before.get(key) != inputs.get(key) for key in ("weights", "val_digest", "subset")):
        return None
    changed = differences(settings_of(before), inputs["settings"])
    if changed:
        raise UserError(
            f"{path.parent} was scored with other settings of evaluate ({'; '.join(changed)}): give the run another "
            "name, take the settings back, or delete that folder"
        )
    return dict(known)


def settings_of(inputs: dict[str, Any]) -> dict[str, Any]:
    """The settings that were scored with; one that is newer than the scores has its default, whose effect it had."""
    return {"precision": EvaluateSection().precision, **inputs.get("settings", {})}


def evaluate_files(
    annotations: Path, detections: Path, out: Path, iou_type: IouType = "bbox", *, verify: bool = False
) -> dict[str, Any]:
    """Score a file of detections against a COCO annotation file and write `<out>/metrics.json`.

    Arguments and what is returned are those of `score`.

    Raises:
        UserError: as `score`, or `out` cannot be made.
    """
    metrics = score(annotations, detections, iou_type, verify=verify)
    make_folder(out)
    write_json(out / METRICS_FILE, metrics)
    return metrics
