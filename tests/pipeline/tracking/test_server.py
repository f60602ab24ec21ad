"""Talking to the server: no telemetry, names that it takes."""

import os
import subprocess
import sys

from pipeline.tracking.server import metric_name


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
