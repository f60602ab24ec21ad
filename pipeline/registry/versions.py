"""Versions of a registered model in MLflow: making one, finding the champion, loading one."""

import json
import tempfile
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.predict.detector import Detector, detector_in
from pipeline.tracking.server import connect, first_line, server_errors
from pipeline.tracking.tracker import Tracker

CHAMPION = "champion"
"""Alias of the best version."""
VAL_TAG = "raydetr.val_digest"
"""Tag with the digest of the validation split that a version was scored on."""


def make_version(tracker: Tracker, name: str, model_id: str, tags: dict[str, str]) -> int:
    from mlflow.exceptions import MlflowException

    try:
        tracker.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = tracker.client.create_model_version(
        name, f"models:/{model_id}", tracker.run_id, tags=tags, model_id=model_id
    )
    # The link from the logged model to its version on MLflow's pages, as `mlflow.register_model` sets it.
    link = json.dumps([{"name": name, "version": str(made.version)}])
    tracker.client.set_logged_model_tags(model_id, {"mlflow.modelVersions": link})
    return int(made.version)


def find_champion(tracker: Tracker, name: str) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        return tracker.client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def open_detector(model: str, tracking_uri: str, device: str = "cpu") -> Detector:
    """Load a detector by its registered name, or from a folder.

    Raises:
        UserError: there is no such model or folder.
    """
    if not model.startswith("models:/"):
        return detector_in(Path(model), device=device)

    connect(tracking_uri)
    from mlflow.artifacts import download_artifacts

    with tempfile.TemporaryDirectory() as folder:
        try:
            local = download_artifacts(artifact_uri=model, dst_path=folder, tracking_uri=tracking_uri)
        except server_errors() as error:
            raise UserError(
                f"{model}: not found in the registry at {tracking_uri} ({first_line(error)}); `raydetr register` makes "
                "a version, and --tracking-uri names another registry"
            ) from error
        return detector_in(Path(local), device=device)
