"""Talking to the server: no telemetry, names that it takes, what its errors mean."""

import os
import subprocess
import sys

import pytest
import sqlalchemy.exc
from mlflow.exceptions import RestException

from pipeline.tracking.server import is_refusal, metric_name, why


def test_telemetry_is_off(mlflow_uri: str) -> None:
    code = (
        "import os; from pathlib import Path; import sys\n"
        "from pipeline.tracking.server import connect\n"
        "assert 'mlflow' not in sys.modules, 'importing the module imports mlflow'\n"
        "connect(sys.argv[1])\n"
        "from mlflow.telemetry.utils import is_telemetry_disabled\n"
        "from mlflow.telemetry.client import get_telemetry_client\n"
        "assert is_telemetry_disabled() and get_telemetry_client() is None"
    )
    clean = {key: value for key, value in os.environ.items() if key not in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")}
    clean.pop("PYTEST_CURRENT_TEST", None)
    subprocess.run([sys.executable, "-c", code, mlflow_uri], check=True, env=clean | {"CI": ""})


def test_metric_name() -> None:
    assert metric_name("AP/traffic light (3)") == "AP/traffic light _3_"


@pytest.mark.parametrize(
    ("name", "is_about_it"),
    [("DataError", True), ("IntegrityError", True), ("InternalError", False), ("ProgrammingError", False)],
)
def test_a_database_of_a_server_is_told_from_what_was_sent(name: str, is_about_it: bool) -> None:
    """MLflow's server answers BAD_REQUEST to all of it, as when PostgreSQL is read-only, or its tables are not made."""
    of_driver = type(name, (Exception,), {"__module__": "psycopg"})("no, not now\nLINE 1")
    text = str(getattr(sqlalchemy.exc, name)("insert into tags", {"key": "a"}, of_driver))
    error = RestException({"error_code": "BAD_REQUEST", "message": text})
    assert is_refusal(error) is is_about_it
    assert why(error) == ("answers BAD_REQUEST" if is_about_it else "has a database that is out of order (no, not now)")


def test_a_server_without_a_free_connection_refuses_nothing() -> None:
    text = str(sqlalchemy.exc.TimeoutError("QueuePool limit of size 5 overflow 10 reached", code="3o7r"))
    assert not is_refusal(RestException({"error_code": "BAD_REQUEST", "message": text}))
