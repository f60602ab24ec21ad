"""Makes the run's scored checkpoint a version of its registered model."""

import json
from pathlib import Path
from typing import Any

from jobs.console import make_console
from pipeline.config.load import dump_config
from pipeline.config.sections import Config
from pipeline.errors import UserError
from pipeline.evaluate.results import METRICS_FILE, weights_digest
from pipeline.log import outcome
from pipeline.registry.register import Registration
from pipeline.registry.register import register as register_version
from pipeline.tracking.tracker import Tracker


def register(config: Config, checkpoint: Path, tracker: Tracker) -> Registration:
    """Register a checkpoint with the metrics that `evaluate` wrote for it; `@champion` moves if it is better.

    Args:
        config: the pipeline.
        checkpoint: the run's last checkpoint.
        tracker: the MLflow run that the version comes from.

    Returns:
        The version, new or made before.

    Raises:
        UserError: the checkpoint was not scored.
        TrackingError: the tracking server is away.
    """
    metrics = _metrics(config.folder.evaluation / METRICS_FILE, checkpoint)
    registration = register_version(
        tracker,
        checkpoint,
        metrics,
        metrics["inputs"]["val_digest"],
        config.register_,
        config.evaluate,
        dump_config(config),
    )
    version = f"{registration.name} version {registration.version}  ({registration.note})"
    make_console().print(outcome("register", version, is_new=registration.is_new))
    return registration


def _metrics(path: Path, checkpoint: Path) -> dict[str, Any]:
    mend = "score it first with `raydetr evaluate`"
    if not path.is_file():
        raise UserError(f"{path}: the checkpoint {checkpoint} has no metrics; {mend}")
    metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if metrics.get("inputs", {}).get("weights") != weights_digest(checkpoint):
        raise UserError(f"{path}: these are not the metrics of {checkpoint}; {mend}")
    return metrics
