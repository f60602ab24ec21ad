"""The registered version that a run begins with (`train.init.weights: models:/...`), kept in the run's folder.

It is resolved and downloaded once: wherever an alias moves then, the run goes on from the version that it began with.
"""

import json
import shutil
import tempfile
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import make_folder, write_json
from pipeline.log import get_logger
from pipeline.predict.detector import SETTINGS
from pipeline.registry.versions import download, open_registry, resolve

PARENT_TAG = "raydetr.parent"
"""Tag of a run and of its versions: the version that it began with."""
VERSION_FILE = "version.json"
"""Beside the weights: what was asked for, and which version it is."""

logger = get_logger(__name__)


def fetch_parent(reference: str, tracking_uri: str, folder: Path) -> None:
    """Download the detector of a version into the folder, unless it is there.

    Args:
        reference: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        tracking_uri: MLflow server of the registry.
        folder: of the run's parent; it appears whole.

    Raises:
        UserError: there is no such version, or the registry cannot be reached.
    """
    if _read(folder).get("reference") == reference:
        return
    make_folder(folder.parent, "set runs")
    try:
        with (
            open_registry(tracking_uri) as client,
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=".parent-") as draft,
        ):
            version = resolve(client, reference)
            download(client, version, tracking_uri, Path(draft) / "files")
            found = next(Path(draft).rglob(SETTINGS)).parent
            name = f"models:/{version.name}/{version.version}"
            write_json(found / VERSION_FILE, {"reference": reference, "version": name})
            shutil.rmtree(folder, ignore_errors=True)
            found.replace(folder)
    except UserError as error:
        raise UserError(f"train.init.weights: {str(error).replace('--tracking-uri', 'tracking.uri')}") from error
    logger.info("train.init.weights: %s is %s", reference, name)


def read_parent(folder: Path) -> str | None:
    """The version in the folder of a run's parent, `models:/NAME/VERSION`; None where there is none."""
    return _read(folder).get("version")


def _read(folder: Path) -> dict[str, str]:
    try:
        content: dict[str, str] = json.loads((folder / VERSION_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content
