"""The MLflow server: talking to it with time-outs and no telemetry, and what it takes for a name.

MLflow is imported by the first call, not by this module: that import takes seconds.
"""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient


def connect(uri: str) -> "MlflowClient":
    """Import MLflow with its telemetry off and return a client of the tracking server and registry at `uri`.

    A request to a server that is away fails after seconds, not the minutes of MLflow's defaults.
    """
    prepare_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    try:
        use_server(uri)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    except (MlflowException, OSError) as error:
        raise UserError(f"tracking.uri {uri}: {first_line(error)}") from error


def use_server(uri: str) -> None:
    """Make `uri` this process's default: the registry's SQL store asks it for models, whatever client it serves."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)


def prepare_mlflow() -> None:
    """Set what MLflow reads from the environment when it is imported: no telemetry, short time-outs, no bars."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["DO_NOT_TRACK"] = "true"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.pyfunc"):
        logging.getLogger(name).setLevel(logging.WARNING)


def server_errors() -> tuple[type[Exception], ...]:
    """Return what MLflow raises when a server is away or refuses."""
    from mlflow.exceptions import MlflowException

    return (MlflowException, OSError)


def artifact_location(uri: str, experiment: str) -> str | None:
    """Return where the artifacts of a new experiment go: beside a SQLite database, else where the server wants them."""
    if not uri.startswith("sqlite:///"):
        return None
    folder = Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts" / metric_name(experiment)
    return folder.as_uri()


def metric_name(name: str) -> str:
    """Return a metric's name with what MLflow refuses in it replaced by an underscore."""
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in name)


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
