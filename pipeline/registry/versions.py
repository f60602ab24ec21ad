"""Versions of a registered model in MLflow: making one, finding the champion, loading one."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.address import SQLITE, shown, sqlite_path
from pipeline.errors import UserError
from pipeline.predict.detector import Detector, detector_in
from pipeline.tracking.server import connect, error_code, server_errors, why
from pipeline.tracking.tracker import Tracker

CHAMPION = "champion"
"""Alias of the best version."""
VAL_TAG = "raydetr.val_digest"
"""Tag with the digest of the validation split that a version was scored on."""
KEY_TAG = "raydetr.key"
"""Tag with the digest of what a version is made of; a logged model that a version is to be made of has it, too."""


def find_version(tracker: Tracker, name: str, key: str) -> Any | None:
    """The version of a registered model that has a key, or None."""
    found = tracker.client.search_model_versions(f"name='{name}' and tags.`{KEY_TAG}`='{key}'")
    return min(found, key=lambda version: int(version.version), default=None)


def make_version(tracker: Tracker, name: str, model_id: str, tags: Mapping[str, str]) -> int:
    """Make a version of a logged model, with its tags at once, and the registered model where it is the first.

    Returns:
        The number of the version.
    """
    try:
        tracker.client.create_registered_model(name)
    except server_errors() as error:
        if error_code(error) != "RESOURCE_ALREADY_EXISTS":
            raise
    made = tracker.client.create_model_version(
        name, f"models:/{model_id}", tracker.run_id, tags=dict(tags), model_id=model_id, await_creation_for=0
    )
    return int(made.version)


def find_champion(tracker: Tracker, name: str) -> Any | None:
    """The version that `@champion` is, or None."""
    try:
        return tracker.client.get_model_version_by_alias(name, CHAMPION)
    except server_errors() as error:
        if error_code(error) not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def open_detector(model: str, tracking_uri: str, device: str = "cpu") -> Detector:
    """Load a detector by its registered name, or from a folder.

    Raises:
        UserError: there is no such model or folder, or no registry can be reached at the address.
    """
    if not model.startswith("models:/"):
        return detector_in(Path(model), device=device)

    address = shown(tracking_uri)
    if address.startswith(SQLITE) and not sqlite_path(address).exists():
        raise UserError(
            f"{model}: there is no registry at {address}; `raydetr register` makes one, --tracking-uri names another"
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            local = _download(model, tracking_uri, folder)
        except server_errors() as error:
            if error_code(error) in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"):
                raise UserError(
                    f"{model}: not found in the registry at {address}; `raydetr register` makes a version, and "
                    "--tracking-uri names another registry"
                ) from error
            raise UserError(
                f"{model}: cannot be read, because the registry at {address} {why(error)}; start it, or name another "
                "with --tracking-uri"
            ) from error
        return detector_in(Path(local), device=device)


def _download(model: str, tracking_uri: str, folder: str) -> str:
    connect(tracking_uri)
    from mlflow.artifacts import download_artifacts

    return str(download_artifacts(artifact_uri=model, dst_path=folder))
