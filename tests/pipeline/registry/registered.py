"""Versions of registered models."""

from pathlib import Path
from typing import Any

from pipeline.config.sections import METRICS, EvaluateSection, RegisterSection
from pipeline.data.labels import Category, LabelMap
from pipeline.registry.register import Registration, register
from pipeline.tracking.tracker import Tracker

LABELS = LabelMap("contiguous", (Category(3, "cat"), Category(90, "dog")))
SECTION = EvaluateSection(short_side=40, max_side=60, max_detections=5)


def make_metrics(value: float) -> dict[str, Any]:
    return {name: value for name in METRICS} | {"per_category": {}}


def register_some(
    tracker: Tracker, checkpoint: Path, name: str, value: float = 0.5, val_digest: str = "val", **section: Any
) -> Registration:
    """A checkpoint of `LABELS`, registered as `name` with all its metrics at `value`."""
    config = {"name": "run", "train": {"lr": 0.1}}
    wanted = RegisterSection(model_name=name, **section)
    return register(tracker, checkpoint, make_metrics(value), val_digest, wanted, SECTION, config)


def files_of(tracker: Tracker, version: Registration, folder: Path) -> Path:
    """Where the files of a version were put below `folder`."""
    from mlflow.artifacts import download_artifacts

    return Path(download_artifacts(artifact_uri=version.uri, dst_path=str(folder), tracking_uri=tracker.uri))
