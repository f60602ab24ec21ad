"""Scores a run's checkpoints on the validation split: inference in Ray's processes, everything else in the driver."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

from jobs.console import ProgressDisplay, make_console
from jobs.interrupt import in_thread
from jobs.room import wait_for_room
from jobs.scoring import ScorerPool, scoring_of
from pipeline.checkpoint.find import all_whole
from pipeline.config.load import dump_config
from pipeline.config.sections import METRICS, Config
from pipeline.config.values import digest
from pipeline.data.manifest import Manifest
from pipeline.evaluate.detect import Detection
from pipeline.evaluate.evaluated import RECORD_FILE, evaluated_of, read_curve
from pipeline.evaluate.page import REPORT_FILE, write_report
from pipeline.evaluate.report import plot_categories, write_category_table, write_pictures
from pipeline.evaluate.results import DETECTIONS_FILE, evaluate_checkpoint
from pipeline.files import disk_told, make_folder, read_json, write_json
from pipeline.log import get_logger, outcome
from pipeline.predict.detector import Detector
from pipeline.run_folder import METRICS_FILE, RunFolder
from pipeline.tracking.provenance import code_version
from pipeline.tracking.spool import Spool, SpoolReader
from pipeline.tracking.tracker import Tracker
from pipeline.train.scores import best_of, loss_fall, scored

logger = get_logger(__name__)

LEAST_VARIETY = 0.2
"""Best boxes that vary less, as a share of how much the objects do, are told."""
LEAST_BETTER, LEAST_FALL = 2.0, 0.02
"""Where AP is not so many times the constant box's, a training loss that falls by a smaller share is told."""
MOST_DRIFT = 0.25
"""AP by which training images may be ahead of validation before it is told."""
SHARES = 4
"""Parts that a worker's batches are given to it in: more give smoother progress, and each begins to decode anew."""


def evaluate(
    config: Config,
    checkpoint: Path,
    manifest: Manifest,
    tracker: Tracker | None,
    train: Manifest | None = None,
    claimed: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> dict[str, Any]:
    """Score the run's last checkpoint, or every kept one with `evaluate.curve`, on the whole split, and report it.

    With `evaluate.subset` the best on those images is scored, too, so that it can be registered.

    Ray must be connected, and every node must see the run and the shards, or their stores. Each checkpoint's
    detections.json and metrics.json are below <run>/evaluate/checkpoint-<step>; those of `checkpoint` are also in
    <run>/evaluate, with report.html, pictures, a table and a plot by category.

    Args:
        config: the pipeline.
        checkpoint: the run's last checkpoint.
        manifest: of the validation split.
        tracker: the MLflow run that gets the metrics and the report, by its outbox; None logs nothing.
        train: of the training split, for `evaluate.train_sample`.
        claimed: gives what a checkpoint of a name is scored within; afterwards it may be scored already.

    Returns:
        The metrics of `checkpoint`.

    Raises:
        UserError: the folder holds scores made with other settings, an input is wrong, or the disk is full.
    """
    out = config.folder.evaluation
    metrics: dict[str, Any] = {}
    with _pool(config) as pool:
        for path in _chosen(config, checkpoint):
            verify = config.evaluate.verify and path == checkpoint
            with claimed(path.name), disk_told(out, "runs"), _progress(path.name, manifest) as shown:
                sample = (train, _Shares(pool, train, None)) if train else None
                shares = _Shares(pool, manifest, shown)
                metrics, is_new = evaluate_checkpoint(
                    path, manifest, config.evaluate, out / path.name, shares, verify=verify, train=sample
                )
            tell_scores(config.folder, path.name, metrics, is_new=is_new)
    with disk_told(out, "runs"):
        _report(config, manifest, metrics, out / checkpoint.name, out)
    if tracker is not None:
        tracker.log_points(config.folder.evaluate_spool)
        for name in (METRICS_FILE, DETECTIONS_FILE, REPORT_FILE, "per_category.csv", "per_category.png"):
            tracker.log_artifacts(out / name, "evaluate")
        tracker.log_artifacts(out / "pictures", "evaluate/pictures")
    return metrics


def _chosen(config: Config, last: Path) -> list[Path]:
    """The checkpoints that are scored on the whole split, oldest first."""
    subset = config.evaluate.subset if config.register_.which == "best" else 0
    if not (config.evaluate.curve or subset):
        return [last]
    kept = all_whole(last.parent)
    if config.evaluate.curve:
        return kept
    scores, names = scored(config.folder, config.register_.metric, subset), {path.name for path in kept}
    best = best_of({name: value for name, value in scores.items() if name in names})
    return [path for path in kept if path == last or path.name == best]


def evaluate_weights(config: Config, weights: Path, manifest: Manifest, out: Path) -> dict[str, Any]:
    """Score a file of weights, such as a published one, on the validation split.

    Below `out` are metrics.json, detections.json, report.html, pictures, a table and a plot by category, and
    `detector`, a folder that `raydetr predict -m` takes. Ray must be connected, and every node must see `out` and the
    shards.

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
    with disk_told(out, "--out"):
        detector.save(folder)
        with _progress(weights.name, manifest) as shown, _pool(config) as pool:
            shares = _Shares(pool, manifest, shown)
            metrics, _ = evaluate_checkpoint(
                folder, manifest, config.evaluate, folder, shares, verify=config.evaluate.verify
            )
        _report(config, manifest, metrics, folder, out)
    return metrics


def tell_scores(run: RunFolder, name: str, metrics: dict[str, Any], *, is_new: bool = True) -> None:
    """Print a checkpoint's scores, write the points of the curves, and say where it has not learned to look."""
    subset = metrics.get("inputs", {}).get("subset")
    with Spool(run.evaluate_spool) as points:
        points.write_once(metrics["step"], _points(metrics, subset), f"{'val_subset' if subset else 'val'}/AP")
    print_scores(name, metrics, is_new=is_new)
    if is_new:
        _warn(run, name, metrics)


def print_scores(name: str, metrics: dict[str, Any], *, is_new: bool = True) -> None:
    """Print a checkpoint's scores, as a line."""
    subset = metrics.get("inputs", {}).get("subset")
    scores = f"{name}  AP {metrics['AP']:.4f}  AP50 {metrics['AP50']:.4f}{f'  on {subset} images' if subset else ''}"
    make_console().print(outcome("evaluate", scores, is_new=is_new))


def _warn(run: RunFolder, name: str, metrics: dict[str, Any]) -> None:
    constant, variety = metrics.get("baseline", {}).get("AP", -1), metrics.get("box_variety")
    if variety is not None and variety < LEAST_VARIETY:
        logger.warning(
            "evaluate: %s gives nearly the same box for every image: its best boxes vary %.2f times as much as the "
            "objects do",
            *(name, variety),
        )
    known = metrics.get("train_sample", {}).get("AP", -1)
    if known - metrics["AP"] > MOST_DRIFT:
        logger.warning(
            "evaluate: %s knows training images better than others: AP %.4f on %d of them, %.4f on validation; more "
            "images, more augmentation or fewer steps may help, and train.patience ends such a run",
            *(name, known, metrics["train_sample"]["images"], metrics["AP"]),
        )
    if metrics["AP"] > LEAST_BETTER * constant:
        return
    fall = loss_fall([record.metrics for record in SpoolReader(run.train_spool).read()])
    if fall is not None and fall < LEAST_FALL:
        logger.warning(
            "evaluate: the training loss up to %s is flat: it fell by %.1f %% from the first half of the steps at this "
            "learning rate to the second; try another train.lr, or train.init.weights",
            *(name, 100 * fall),
        )
    if 0 <= metrics["AP"] <= constant:
        logger.warning(
            "evaluate: %s is no better than one constant box a category for every image, which has AP %.4f: it has "
            "not learned to look at them yet; more steps, another train.lr, or train.init.weights may help",
            *(name, constant),
        )


def _points(metrics: dict[str, Any], subset: int | None) -> dict[str, float]:
    """The points of the curves: those that there are objects for. Those of a subset are other curves."""
    of = "_subset" if subset else ""
    points = {f"val{of}/{name}": metrics[name] for name in METRICS}
    points |= {f"baseline{of}/{name}": metrics.get("baseline", {}).get(name, -1) for name in ("AP", "AP50")}
    points |= {f"val{of}_category/AP/{name}": values["AP"] for name, values in metrics["per_category"].items()}
    points |= {f"train_sample/{name}": metrics.get("train_sample", {}).get(name, -1) for name in ("AP", "AP50")}
    if metrics.get("box_variety") is not None:
        points[f"val{of}/box_variety"] = metrics["box_variety"]
    if subset:
        points["val_subset/images"] = subset
    return {name: value for name, value in points.items() if value >= 0}


def _report(config: Config, manifest: Manifest, metrics: dict[str, Any], source: Path, out: Path) -> None:
    """Put the results of the last checkpoint on top, with report, pictures, table and plot; the record comes last."""
    section, curve = config.evaluate, read_curve(out, manifest.digest)
    scored = [metrics["inputs"], metrics["step"], metrics["verified"], curve]
    key = digest([*scored, str(manifest.folder), section.pictures, section.picture_score])
    record = out / RECORD_FILE
    if (out / REPORT_FILE).is_file() and record.is_file() and read_json(record, "record")["key"] == key:
        return
    settings, code = dump_config(config), code_version()
    pictures = out / "pictures"
    shutil.rmtree(pictures, ignore_errors=True)
    detections = json.loads((source / DETECTIONS_FILE).read_text(encoding="utf-8"))
    write_pictures(manifest, detections, pictures, section.pictures, section.picture_score)
    write_category_table(metrics, out / "per_category.csv")
    plot_categories(metrics, out / "per_category.png")
    for name in (DETECTIONS_FILE, METRICS_FILE):
        shutil.copyfile(source / name, out / f".{name}.tmp")
        (out / f".{name}.tmp").replace(out / name)
    evaluated = evaluated_of(source, manifest, settings, code, curve)
    in_thread(partial(write_report, out / REPORT_FILE, evaluated), "report").result()  # see jobs/report.py
    write_json(record, {"key": key, "config": settings, "code": code, "val": str(manifest.folder)})


class _Shares:
    """Runs a checkpoint's network over batches of a split, cut into shares for a pool."""

    def __init__(self, pool: Callable[[], ScorerPool], manifest: Manifest, shown: ProgressDisplay | None) -> None:
        self._pool = pool
        self._manifest = manifest
        self._shown = shown

    def __call__(self, checkpoint: Path, batches: list[list[int]]) -> Iterator[list[Detection]]:
        pool = self._pool()
        count = min(len(batches), pool.at_once * SHARES)
        shares = [batches[index::count] for index in range(count)]
        for share, detections in pool.detect(checkpoint.absolute(), self._manifest, shares):
            yield detections
            if self._shown is not None:
                self._shown.advance(sum(len(batch) for batch in share))


@contextmanager
def _pool(config: Config) -> Iterator[Callable[[], ScorerPool]]:
    """Gives processes for `evaluate.workers` at once, where there is room for one: what is scored by now needs none."""
    with ExitStack() as stack:

        @cache
        def pool() -> ScorerPool:
            scoring = scoring_of(config)
            if scoring.custom:
                wait_for_room(config.cluster, [1], scoring.resources, "evaluate")
            return stack.enter_context(ScorerPool(scoring, config.evaluate.workers or config.cluster.most_workers))

        yield pool


def _progress(name: str, manifest: Manifest) -> ProgressDisplay:
    return ProgressDisplay(make_console(), f"evaluate: {name} ", len(manifest.samples), "images")
