"""What a report is about: an evaluation that lies in a folder, or two files, with the images it was made on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.load import parse_config
from pipeline.config.sections import METRICS, EvaluateSection
from pipeline.data.cache import cache_of
from pipeline.data.images import Pixels, decode_image, shown_size
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.data.samples import load_image
from pipeline.data.truth import ground_truth
from pipeline.errors import UserError, shown
from pipeline.evaluate.documents import Found, Truth, detections_of, ground_truth_of
from pipeline.evaluate.results import DETECTIONS_FILE
from pipeline.evaluate.score import score
from pipeline.files import read_json
from pipeline.run_folder import METRICS_FILE, RunFolder
from pipeline.shard.origin import open_images
from pipeline.store import place

RECORD_FILE = "report.json"
"""What an evaluation was made with, beside its results: the whole "config", "code", and "val", the folder of shards."""

Curve = list[tuple[int, dict[str, float]]]
"""Steps of checkpoints, and the twelve numbers of each."""


@dataclass(frozen=True)
class Evaluated:
    """Detections with their score, and what they were to find."""

    name: str
    metrics: dict[str, Any]
    """What `score` gives; of a run also step, checkpoint and inputs."""
    truth: Truth
    found: Found
    least_score: float
    """Of a detection that is shown at first."""
    read: Callable[[int], Pixels] | None = None
    """Reads an image by its number; raises `UnreadableSampleError`, `BadImageError` or `OSError`."""
    config: dict[str, Any] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)
    curve: Curve = field(default_factory=list)


def evaluation_folder(path: Path) -> Path:
    """The evaluation that a path means: of a run, of one checkpoint of it, or what `raydetr evaluate --out` wrote.

    Raises:
        UserError: there is none.
    """
    for folder in (path, RunFolder(path).evaluation):
        if (folder / METRICS_FILE).is_file():
            return folder
    raise UserError(f"{path}: no {METRICS_FILE} here or in evaluate below it; `raydetr evaluate` first")


def read_evaluated(folder: Path) -> Evaluated:
    """Read an evaluation.

    Raises:
        UserError: a file of it cannot be used, or its shards are no longer those that it was made on.
    """
    top = folder if (folder / RECORD_FILE).is_file() else folder.parent
    if not (top / RECORD_FILE).is_file():
        raise UserError(
            f"{folder}: no {RECORD_FILE} tells what was evaluated here; `raydetr evaluate` a run again, or give "
            "--annotations and --detections where it was a file"
        )
    record = read_json(top / RECORD_FILE, "record of the evaluation")
    try:
        config, shards = parse_config(dict(record["config"]), str(top / RECORD_FILE)), place(record["val"])
        code = dict(record["code"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{top / RECORD_FILE}: an earlier version wrote it; `raydetr evaluate` again") from None
    manifest = read_manifest(shards, cache_of(config.shards))
    return evaluated_of(folder, manifest, record["config"], code, read_curve(top, manifest.digest))


def evaluated_of(
    folder: Path, manifest: Manifest, config: Mapping[str, Any], code: Mapping[str, str], curve: Curve
) -> Evaluated:
    """The detections and the score that lie in a folder, of a split.

    Raises:
        UserError: a file cannot be used, or is of another split.
    """
    metrics = read_json(folder / METRICS_FILE, "metrics file")
    if metrics["inputs"]["val_digest"] != manifest.digest:
        raise UserError(
            f"{folder}: was scored on other shards than those in {manifest.folder}; `raydetr evaluate` again"
        )
    truth = ground_truth_of(ground_truth(manifest), "bbox")
    found = detections_of(folder / DETECTIONS_FILE, truth, "bbox")
    least_score = config["evaluate"]["picture_score"]
    read = _sample_reader(manifest, truth)
    return Evaluated(config["name"], metrics, truth, found, least_score, read, dict(config), dict(code), curve)


def read_curve(folder: Path, val_digest: str) -> Curve:
    """The checkpoints below an evaluation's folder that were scored on a split."""
    points: dict[int, dict[str, float]] = {}
    for path in folder.glob(f"*/{METRICS_FILE}"):
        metrics = read_json(path, "metrics file")
        if metrics.get("step") is not None and metrics["inputs"]["val_digest"] == val_digest:
            points[metrics["step"]] = {name: metrics[name] for name in METRICS}
    return sorted(points.items())


def read_files(annotations: Path, detections: Path, images: Path | None = None) -> Evaluated:
    """Score a file of detections, as `evaluate_files` does.

    Args:
        annotations: a COCO annotation file.
        detections: in COCO's result format.
        images: folder or archive of the images; None shows boxes alone.

    Raises:
        UserError: a file cannot be used.
    """
    metrics = score(annotations, detections)
    truth = ground_truth_of(annotations, "bbox")
    found = detections_of(detections, truth, "bbox")
    read = None if images is None else _file_reader(annotations, images, truth)
    return Evaluated(detections.stem, metrics, truth, found, EvaluateSection().picture_score, read)


def _sample_reader(manifest: Manifest, truth: Truth) -> Callable[[int], Pixels]:
    places = {truth.images[sample.image_id]: place for place, sample in enumerate(manifest.samples)}
    return lambda number: load_image(manifest, manifest.samples[places[number]])


def _file_reader(annotations: Path, images: Path, truth: Truth) -> Callable[[int], Pixels]:
    opened = open_images(images)
    outside = opened.outside([name for name in truth.files.values() if name])
    if outside is not None:
        raise UserError(f"{annotations}: the file_name {shown(repr(outside))} leads out of {images}; mend it")

    def read(number: int) -> Pixels:
        content = opened.read(truth.files[number])
        return decode_image(content, *(truth.sizes[number] or shown_size(content)))

    return read
