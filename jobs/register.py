"""Makes a scored checkpoint of the run a version of its registered model."""

from pathlib import Path
from typing import Any

from pipeline.checkpoint.state import STATE, DamagedError
from pipeline.config.load import dump_config
from pipeline.config.sections import Config
from pipeline.errors import UserError
from pipeline.evaluate.results import settings_of, weights_digest
from pipeline.files import read_json
from pipeline.log import get_logger
from pipeline.registry.parent import read_parent
from pipeline.registry.register import Registration
from pipeline.registry.register import register as register_version
from pipeline.run_folder import METRICS_FILE
from pipeline.tracking.tracker import Tracker

logger = get_logger(__name__)


def register(config: Config, checkpoint: Path, tracker: Tracker) -> Registration | None:
    """Register a checkpoint with the metrics that `evaluate` wrote for it; `@champion` moves if it is better.

    Args:
        config: the pipeline; `register.which` says which of the scored checkpoints it is.
        checkpoint: the run's last checkpoint.
        tracker: the MLflow run that the version comes from.

    Returns:
        The version, new or made before; None where it waits in the outbox, or the server refuses it.

    Raises:
        UserError: the checkpoint was not scored.
    """
    metrics = _metrics(config.folder.evaluation / METRICS_FILE, checkpoint)
    if config.register_.which == "best":
        checkpoint, metrics = best_checkpoint(config, checkpoint, metrics)
    return register_version(
        tracker,
        checkpoint,
        metrics,
        metrics["inputs"]["val_digest"],
        config.register_,
        config.evaluate,
        dump_config(config),
        read_parent(config.folder.parent) if config.train.init.is_registered else None,
    )


def best_checkpoint(config: Config, last: Path, metrics: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The best by `register.metric` of the checkpoints that were scored like the last one, and its metrics.

    One whose folder is gone, or holds other weights by now, is left out; of equal ones the later is taken.
    """
    metric = config.register_.metric
    like = _told_apart(metrics["inputs"])
    scored = [(metrics[metric], metrics.get("step") or 0, last, metrics)]
    for name, file in config.folder.scores().items():
        found = read_json(file, "metrics file")
        if _told_apart(found.get("inputs", {})) == like and name != last.name:
            scored.append((found[metric], found["step"], last.parent / name, found))
    for value, _, path, found in sorted(scored, key=lambda each: each[:2], reverse=True):
        if path == last or _holds(path, found["inputs"]["weights"]):
            return path, found
        logger.warning("%s, with %s %.4f, is gone: the best that is there is registered", path, metric, value)
    return last, metrics


def _told_apart(inputs: dict[str, Any]) -> dict[str, Any]:
    """What scores of two checkpoints must have in common to be compared."""
    return {**inputs, "settings": settings_of(inputs), "weights": None}


def _holds(checkpoint: Path, digest: str) -> bool:
    """Whether a checkpoint is there, whole, and has the weights of a digest."""
    try:
        return (checkpoint / STATE).is_file() and weights_digest(checkpoint) == digest
    except DamagedError as error:
        logger.warning("%s", error)
        return False


def _metrics(path: Path, checkpoint: Path) -> dict[str, Any]:
    mend = "score it first with `raydetr evaluate`"
    if not path.is_file():
        raise UserError(f"{path}: the checkpoint {checkpoint} has no metrics; {mend}")
    metrics: dict[str, Any] = read_json(path, "metrics file")
    if metrics.get("inputs", {}).get("weights") != weights_digest(checkpoint):
        raise UserError(f"{path}: these are not the metrics of {checkpoint}; {mend}")
    return metrics
