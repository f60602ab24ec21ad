"""Scores a run's checkpoints on the validation split: inference as Ray tasks, everything else in the driver."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jobs.cluster import device_of
from pipeline.checkpoint.save import checkpoints
from pipeline.config.sections import Config, digest, plain
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.errors import UserError
from pipeline.evaluate.report import plot_categories, write_category_table, write_pictures
from pipeline.evaluate.score import DETECTIONS_FILE, METRICS, METRICS_FILE, Detection, detect, evaluate_checkpoint
from pipeline.files import make_folder, write_json
from pipeline.predict.detector import Detector
from pipeline.tracking.tracker import Spool, SpoolReader, Tracker

SHARES = 4
"""Inference tasks of a worker: more give smoother progress, and each loads the weights."""
PLAIN_SECONDS = 10
"""Seconds between two lines of progress where there is no terminal."""
UPLOADED = "uploaded.json"
"""Remembers which report the MLflow run has got."""


def evaluate(config: Config, checkpoint: Path, manifest: Manifest, tracker: Tracker | None) -> dict[str, Any]:
    """Score the run's last checkpoint, or every kept one with `evaluate.curve`, and report it.

    Ray must be connected, and every node must see the checkpoints and the shards. Each checkpoint's detections.json and
    metrics.json are below <run>/evaluate/checkpoint-<step>; those of `checkpoint` are also in <run>/evaluate, with
    pictures, a table and a plot by category.

    Args:
        config: the pipeline.
        checkpoint: the run's last checkpoint.
        manifest: of the validation split.
        tracker: the MLflow run that gets the metrics and the report; None logs nothing.

    Returns:
        The metrics of `checkpoint`.

    Raises:
        UserError: the folder holds scores made with other settings, or an input is wrong.
        TrackingError: the tracking server is away; the points and files are kept, and the next call uploads them.
    """
    out = config.folder / "evaluate"
    console = Console(highlight=False, soft_wrap=True)
    spool = config.folder / "spool" / "evaluate.jsonl"
    chosen = checkpoints(checkpoint.parent) if config.evaluate.curve else [checkpoint]
    metrics: dict[str, Any] = {}
    for path in chosen:
        with _Shown(console, path.name, len(manifest.samples)) as shown:
            tasks = _Tasks(config, manifest, shown)
            metrics, new = evaluate_checkpoint(path, manifest, config.evaluate, out / path.name, tasks)
        if metrics["step"] not in {record.step for record in SpoolReader(spool).read()}:
            with Spool(spool) as points:
                points.write(metrics["step"], _points(metrics))
        done = "" if new else "already done, "
        console.print(f"evaluate: {done}{path.name}  AP {metrics['AP']:.4f}  AP50 {metrics['AP50']:.4f}")
    _report(config, manifest, metrics, out / checkpoint.name, out)
    if tracker is not None:
        tracker.drain(tracker.reader(spool), final=True)
        _upload(tracker, out)
    return metrics


def evaluate_weights(config: Config, weights: Path, manifest: Manifest, out: Path) -> dict[str, Any]:
    """Score a file of weights, such as a published one, on the validation split.

    Below `out` are metrics.json, detections.json, pictures, a table and a plot by category, and `detector`, a folder
    that `raydetr predict -m` takes. Ray must be connected, and every node must see `out` and the shards.

    Args:
        config: the pipeline; its model section is the architecture of the weights.
        weights: a file or folder of any format that `model.weights.read_weights` takes.
        manifest: of the validation split.
        out: folder of the results.

    Returns:
        The metrics.

    Raises:
        UserError: the weights cannot be read or are not those of the model section, or an input is wrong.
    """
    architecture = config.model_for(manifest.labels.num_classes)
    detector = Detector.from_weights(weights, architecture, manifest.labels, config.evaluate)
    folder = out / "detector"
    make_folder(folder)
    detector.save(folder)
    with _Shown(Console(highlight=False, soft_wrap=True), weights.name, len(manifest.samples)) as shown:
        tasks = _Tasks(config, manifest, shown)
        metrics, _ = evaluate_checkpoint(folder, manifest, config.evaluate, folder, tasks)
    _report(config, manifest, metrics, folder, out)
    return metrics


def _points(metrics: dict[str, Any]) -> dict[str, float]:
    """The points of the curves: those that there are objects for."""
    points = {f"val/{name}": metrics[name] for name in METRICS}
    points |= {f"val_category/AP/{name}": values["AP"] for name, values in metrics["per_category"].items()}
    return {name: value for name, value in points.items() if value >= 0}


def _report(config: Config, manifest: Manifest, metrics: dict[str, Any], source: Path, out: Path) -> None:
    """Put the results of the last checkpoint on top, with pictures, table and plot; metrics.json last."""
    section = config.evaluate
    key = digest([metrics["inputs"], metrics["step"], section.pictures, section.picture_score])
    marker = out / "report.json"
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8"))["key"] == key:
        return
    pictures = out / "pictures"
    shutil.rmtree(pictures, ignore_errors=True)
    detections = json.loads((source / DETECTIONS_FILE).read_text(encoding="utf-8"))
    write_pictures(manifest, detections, pictures, section.pictures, section.picture_score)
    write_category_table(metrics, out / "per_category.csv")
    plot_categories(metrics, out / "per_category.png")
    for name in (DETECTIONS_FILE, METRICS_FILE):
        shutil.copyfile(source / name, out / f".{name}.tmp")
        (out / f".{name}.tmp").replace(out / name)
    write_json(marker, {"key": key})


def _upload(tracker: Tracker, out: Path) -> None:
    """Log the report to the MLflow run, unless it has got this one."""
    wanted = {"run_id": tracker.run_id, "key": json.loads((out / "report.json").read_text(encoding="utf-8"))["key"]}
    marker = out / UPLOADED
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == wanted:
        return
    for name in (METRICS_FILE, DETECTIONS_FILE, "per_category.csv", "per_category.png"):
        tracker.log_artifacts(out / name, "evaluate")
    tracker.log_artifacts(out / "pictures", "evaluate/pictures")
    write_json(marker, wanted)


class _Tasks:
    """Runs a checkpoint's network over batches as Ray tasks, `evaluate.workers` at once."""

    def __init__(self, config: Config, manifest: Manifest, shown: "_Shown") -> None:
        self._config = config
        self._manifest = manifest
        self._shown = shown

    def __call__(self, checkpoint: Path, batches: list[list[int]]) -> Iterator[list[Detection]]:
        config = self._config
        workers = config.evaluate.workers or config.cluster.workers
        device = device_of(config.cluster)
        settings = {
            "checkpoint": str(checkpoint.resolve()),
            "shards": str(self._manifest.folder.resolve()),
            "evaluate": plain(config.evaluate),
            "device": device,
            "threads": max(1, int(config.cluster.cpus_per_worker)),
            "on_error": config.dataset.on_error,
        }
        resources = {"num_cpus": config.cluster.cpus_per_worker, "num_gpus": 1 if device == "cuda" else 0}
        remote = ray.remote(**resources)(_detect_share)
        count = min(len(batches), workers * SHARES)
        waiting = [batches[index::count] for index in range(count)][::-1]
        running: dict[Any, int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    share = waiting.pop()
                    running[remote.remote(settings, share)] = sum(len(batch) for batch in share)
                (done,), _ = ray.wait(list(running), num_returns=1)
                images = running.pop(done)
                yield _result(done)
                self._shown.advance(images)
        finally:
            for reference in running:
                ray.cancel(reference)


def _detect_share(settings: dict[str, Any], batches: list[list[int]]) -> list[Detection]:
    """What one task does: it loads the weights from the shared disk once, for all its batches."""
    import torch

    from pipeline.config.sections import EvaluateSection

    torch.set_num_threads(settings["threads"])
    return detect(
        Path(settings["checkpoint"]),
        read_manifest(Path(settings["shards"])),
        batches,
        EvaluateSection(**settings["evaluate"]),
        settings["device"],
        on_error=settings["on_error"],
    )


def _result(reference: Any) -> list[Detection]:
    try:
        detections: list[Detection] = ray.get(reference)
        return detections
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise


class _Shown:
    """Progress of the inference: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, name: str, images: int) -> None:
        self._console = console
        self._name = name
        self._images = images
        self._done = 0
        self._printed = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._task = self._progress.add_task(f"evaluate {name}", total=images)

    def __enter__(self) -> "_Shown":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, images: int) -> None:
        """Count images that are done."""
        self._done += images
        self._progress.advance(self._task, images)
        if not self._console.is_terminal and time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._console.print(f"evaluate: {self._name}  {self._done}/{self._images} images")
            self._printed = time.monotonic()
