"""A real MLflow on SQLite, and a version in it."""

from pathlib import Path

import pytest

from pipeline.registry.register import Registration
from pipeline.tracking.tracker import Tracker
from tests.builders import write_checkpoint
from tests.pipeline.registry.registered import LABELS, register_some


@pytest.fixture(scope="package")
def tracker(mlflow_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return Tracker(mlflow_uri, "registry", "run", tmp_path_factory.mktemp("run") / "mlflow.json")


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints"), LABELS)


@pytest.fixture(scope="package")
def version(tracker: Tracker, checkpoint: Path) -> Registration:
    """Version 1 of the model `shown`."""
    return register_some(tracker, checkpoint, "shown")
