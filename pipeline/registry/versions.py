"""Versions of a registered model in MLflow: making one, finding one, loading one."""

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config.address import SQLITE, shown, sqlite_path
from pipeline.errors import UserError
from pipeline.errors import shown as told
from pipeline.files import disk_told, make_folder
from pipeline.predict.detector import Detector, detector_in
from pipeline.tracking.server import connect, error_code, server_errors, use_server, why
from pipeline.tracking.tracker import Tracker

NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND")
"""Error codes of what a registry does not have."""
KEY_TAG = "raydetr.key"
"""Tag with the digest of what a version is made of; a logged model that a version is to be made of has it, too."""
EXPORT_TAG = "raydetr.export."
"""What the tags begin with that tell of the exported files of a version; then comes the file's name."""
EXPORTS = "exports"
"""Folder of these files among the version's."""


def find_version(tracker: Tracker, name: str, key: str) -> Any | None:
    """The version of a registered model that has a key, or None."""
    found = tracker.client.search_model_versions(f"name='{name}' and tags.`{KEY_TAG}`='{key}'")
    return min(found, key=lambda version: int(version.version), default=None)


def make_version(tracker: Tracker, name: str, model_id: str, tags: Mapping[str, str], description: str) -> int:
    """Make a version of a logged model, with all that it says, and the registered model where it is the first.

    Returns:
        The number of the version.
    """
    try:
        tracker.client.create_registered_model(name)
    except server_errors() as error:
        if error_code(error) != "RESOURCE_ALREADY_EXISTS":
            raise
    made = tracker.client.create_model_version(
        name,
        f"models:/{model_id}",
        tracker.run_id,
        tags=dict(tags),
        description=description,
        model_id=model_id,
        await_creation_for=0,
    )
    return int(made.version)


def find_alias(client: Any, name: str, alias: str) -> Any | None:
    """The version that an alias of a registered model is, or None."""
    try:
        return client.get_model_version_by_alias(name, alias)
    except server_errors() as error:
        if error_code(error) not in NOT_THERE:
            raise
        return None


@contextmanager
def open_registry(tracking_uri: str) -> Iterator[Any]:
    """MLflow's client of the registry at an address; what the server refuses in the block is told in one line.

    Raises:
        UserError: there is no registry, or it is away.
    """
    address = shown(tracking_uri)
    if address.startswith(SQLITE) and not sqlite_path(address).exists():
        raise UserError(
            f"there is no registry at {address}; `raydetr register` makes one, --tracking-uri names another"
        )
    client = connect(tracking_uri)
    try:
        yield client
    except server_errors() as error:
        raise UserError(
            f"the registry at {address} {why(error)}; start it, or name another with --tracking-uri"
        ) from error


def resolve(client: Any, reference: str) -> Any:
    """MLflow's version that `NAME@ALIAS` or `NAME/VERSION` means; `models:/` may stand before it.

    Raises:
        UserError: there is none, with those that there are.
    """
    name, which = split_reference(reference)
    model = find_model(client, name)
    try:
        if which.isdecimal():
            return client.get_model_version(name, which)
        return client.get_model_version_by_alias(name, which)
    except server_errors() as error:
        if error_code(error) not in NOT_THERE:
            raise
    aliases = ", ".join(f"@{alias} ({version})" for alias, version in sorted(dict(model.aliases or {}).items()))
    numbers = sorted(int(version.version) for version in client.search_model_versions(f"name='{name}'"))
    what = f"version {which}" if which.isdecimal() else f"alias @{which}"
    known = ", ".join(str(number) for number in numbers[-10:]) or "none"
    raise UserError(f"{name} has no {what}; its versions are {known}, its aliases {aliases or 'none'}")


def find_model(client: Any, name: str) -> Any:
    """MLflow's registered model of a name.

    Raises:
        UserError: there is none.
    """
    try:
        return client.get_registered_model(name)
    except server_errors() as error:
        if error_code(error) not in NOT_THERE:
            raise
        raise UserError(
            f"there is no registered model `{told(name)}`; `raydetr models list` shows them, --tracking-uri names "
            "another registry"
        ) from error


def split_reference(reference: str) -> tuple[str, str]:
    """The name and the alias or number of a reference.

    Raises:
        UserError: it names no version.
    """
    match = re.fullmatch(r"(.+)[@/]([\w-]+)", reference.removeprefix("models:/"))
    if match is None:
        name = told(reference.removeprefix("models:/"))
        raise UserError(f"{name} names no version: it must be NAME@ALIAS, such as cells@champion, or NAME/7")
    return match[1], match[2]


def download(client: Any, version: Any, tracking_uri: str, out: Path) -> None:
    """Write the files of a version into a folder that `raydetr predict -m` takes; it appears whole.

    Raises:
        UserError: there is something at `out`, it cannot be written, or the version is no detector of ours.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; delete it, or choose another --out")
    make_folder(out.absolute().parent, "choose another --out")
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    try:
        with disk_told(out, "--out"):
            files = _files_of(version, tracking_uri, str(draft))
            detector_in(files)
            files.replace(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_attachment(version: Any, name: str) -> None:
    """Raise a UserError where a version cannot have an exported file of that name."""
    if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
        raise UserError(f"{told(name)}: the name of a version's file has letters, digits, _, . and - alone")
    if EXPORT_TAG + name in version.tags:
        raise UserError(f"{version.name} version {version.version} has a {name} already; choose another name for --out")


def attach_file(client: Any, version: Any, file: Path, what: str) -> None:
    """Add an exported file to the files of a version; its tag comes last, so what was cut off is done again."""
    client.log_model_artifact(version.source.removeprefix("models:/"), str(file), EXPORTS)
    client.set_model_version_tag(version.name, version.version, EXPORT_TAG + file.name, what)


def open_detector(model: str, tracking_uri: str, device: str = "cpu") -> Detector:
    """Load a detector by its registered name, or from a folder.

    Raises:
        UserError: there is no such model or folder, or no registry can be reached at the address.
    """
    if not model.startswith("models:/"):
        return detector_in(Path(model), device=device)
    with open_registry(tracking_uri) as client, tempfile.TemporaryDirectory() as folder:
        return detector_in(_files_of(resolve(client, model), tracking_uri, folder), device=device)


def _files_of(version: Any, tracking_uri: str, folder: str) -> Path:
    """Where the files of a version are put below a folder."""
    use_server(tracking_uri)
    from mlflow.artifacts import download_artifacts

    return Path(download_artifacts(artifact_uri=f"models:/{version.name}/{version.version}", dst_path=folder))
