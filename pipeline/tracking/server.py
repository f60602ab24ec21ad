"""The MLflow server: talking to it with time-outs and no telemetry, and what its errors mean.

MLflow is imported by the first call, not by this module: that import takes seconds.
"""

import contextlib
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.address import (
    HTTP,
    SQLITE,
    credentials,
    for_client,
    shown,
    sqlite_path,
    sqlite_uri,
    without_secrets,
)
from pipeline.errors import UserError
from pipeline.files import held
from pipeline.log import get_logger
from pipeline.tracking.names import metric_name

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = get_logger(__name__)

REFUSALS = frozenset(
    {
        *("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "INVALID_STATE", "PERMISSION_DENIED"),
        *("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS", "RESOURCE_CONFLICT", "RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"),
        *("RESOURCE_LIMIT_EXCEEDED", "FEATURE_DISABLED", "CUSTOMER_UNAUTHORIZED_FOR_RESOURCE"),
    }
)
"""Error codes of answers that would be the same the next time."""
ABOUT_WHAT_WAS_SENT = frozenset({"9h9h", "gkpj", "cd3x"})
"""SQLAlchemy's numbers of errors about what was sent: data, integrity, a parameter. Others are the database's own."""
CREDENTIALS = frozenset({"UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"})
"""Error codes of a server that wants another user or password."""
TRY_LATER = (401, 404, 407, 408, 425, 429)
"""HTTP statuses below 500 that do not speak about what was sent."""


def connect(uri: str) -> "MlflowClient":
    """Import MLflow with its telemetry off and return a client of the tracking server and registry at `uri`.

    A request to a server that is away fails after seconds, not the minutes of MLflow's defaults. User and password of
    an http(s) address go to MLflow by the environment of this process, and nowhere else.

    Raises:
        UserError: the address is none that MLflow knows.
        Exception: one of `server_errors`, where a database cannot be opened.
    """
    prepare_mlflow()
    import mlflow.store.db.utils as databases
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    databases.MAX_RETRY_COUNT = 1  # else it tries for minutes; whoever calls tries again
    databases._make_parent_dirs_if_sqlite = lambda uri: None  # it does not decode the address, and makes other folders

    address, secret = for_client(uri), credentials(uri)
    if secret is not None:
        os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"] = secret
    if address.startswith(SQLITE):
        _make_database(sqlite_path(address))
    try:
        use_server(address)
        return MlflowClient(tracking_uri=address, registry_uri=address)
    except MlflowException as error:
        if error.error_code == "INVALID_PARAMETER_VALUE":
            raise UserError(f"tracking.uri {shown(uri)}: MLflow does not know such an address") from error
        raise


def use_server(uri: str) -> None:
    """Make `uri` this process's default: the registry's SQL store asks it for models, whatever client it serves."""
    import mlflow

    mlflow.set_tracking_uri(for_client(uri))
    mlflow.set_registry_uri(for_client(uri))


def prepare_mlflow() -> None:
    """Set what MLflow reads from the environment: no telemetry, short time-outs, no bars, nothing sent twice.

    An answer may be lost on its way: its request is sent again by whoever looks first whether it was done (`Tracker`,
    `register`), not by MLflow's client, which would make a second run or version.
    """
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["DO_NOT_TRACK"] = "true"
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.pyfunc"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs tracebacks of what it raises


def _make_database(path: Path) -> None:
    """Make MLflow's database aside and put it in its place whole: one that is half made can never be used again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _is_made(path):
        with held(path.with_name(f"{path.name}.lock"), f"the making of {path}", wait=True):
            if not _is_made(path):
                _make_whole(path)
    with contextlib.closing(sqlite3.connect(path)) as database:  # MLflow would try for minutes to open what it cannot
        database.execute("PRAGMA schema_version").fetchone()


def _is_made(path: Path) -> bool:
    return path.exists() and (path.is_dir() or path.stat().st_size > 0)


def _make_whole(path: Path) -> None:
    from mlflow import MlflowClient

    draft = path.with_name(f".{path.name}.making")
    leftovers = (draft, draft.with_name(f"{draft.name}-journal"))
    try:
        for file in leftovers:
            file.unlink(missing_ok=True)
        client = MlflowClient(tracking_uri=sqlite_uri(draft), registry_uri=sqlite_uri(draft))
        client.search_experiments(max_results=1)
        client.search_registered_models(max_results=1)
        draft.replace(path)
    finally:
        for file in leftovers:
            file.unlink(missing_ok=True)


def server_errors() -> tuple[type[Exception], ...]:
    """Return what MLflow raises when a server, or its database, is away or refuses."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, sqlite3.Error, OSError)


def is_refusal(error: Exception) -> bool:
    """Whether the server answered that it does not take this, so that trying again is of no use."""
    from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return 400 <= status < 500 and status not in TRY_LATER
    cause = error.__cause__
    if isinstance(cause, SQLAlchemyError) and not isinstance(cause, DataError | IntegrityError):
        return False
    return error_code(error) in REFUSALS and not _is_of_database(error)


def _is_of_database(error: Exception) -> bool:
    """Whether a server's database is out of order: MLflow calls all that it says BAD_REQUEST, and the text tells."""
    found = re.search(r"sqlalche\.me/e/\d+/(\w+)", str(error))
    return found is not None and found[1] not in ABOUT_WHAT_WAS_SENT


def error_code(error: Exception) -> str:
    """MLflow's name of an error; empty where it has none."""
    return str(getattr(error, "error_code", None) or "")


def why(error: Exception) -> str:
    """What is wrong with a server, in a few words of our own: the client's text may be long, and holds addresses."""
    cause: Any = error.__cause__ if hasattr(error.__cause__, "orig") else error
    database = getattr(cause, "orig", None) or (cause if isinstance(cause, sqlite3.Error) else None)
    if database is not None:
        return f"is out of order ({first_line(database)})"
    if _is_of_database(error):
        said = re.search(r"\(\w+\.[\w.]+\) (.+)", str(error))  # by the driver, below what SQLAlchemy says first
        return f"has a database that is out of order ({without_secrets(said[1]) if said else first_line(error)})"
    retried = re.search(r"too many (\d{3}) error responses", str(error))  # by an HTTP client that gave up
    status = retried[1] if retried else getattr(getattr(error, "response", None), "status_code", None)
    if error_code(error) in CREDENTIALS or status == 401:
        return "refuses user and password (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD)"
    if error_code(error) not in ("", "INTERNAL_ERROR"):
        return f"answers {error_code(error)}"
    if status is not None:
        return f"answers {status}"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be given everything ({error.strerror})"
    return "is away"


def every(ask: Callable[[str | None], Any]) -> Iterator[Any]:
    """All entries of an answer that comes in pages; `ask` gets the token of the page, None for the first."""
    token = None
    while True:
        page = ask(token)
        yield from page
        token = page.token
        if not token:
            return


def artifact_location(uri: str, experiment: str) -> str | None:
    """Return where the artifacts of a new experiment go: beside a SQLite database, else where the server wants them."""
    if not uri.startswith(SQLITE):
        return None
    return (sqlite_path(uri).parent / "mlartifacts" / metric_name(experiment)[:60]).as_uri()


def page(uri: str, experiment_id: str, run_id: str) -> str:
    """How to see a run: its page on a server, or the command that serves a database."""
    if not uri.startswith(HTTP):
        return f"mlflow ui --backend-store-uri {shown(uri)}"
    return f"{shown(uri)}/#/experiments/{experiment_id}/runs/{run_id}" if run_id else shown(uri)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without what is secret in it."""
    return without_secrets(str(error).splitlines()[0]) if str(error) else type(error).__name__
