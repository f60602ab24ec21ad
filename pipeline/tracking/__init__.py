"""Metrics on their way to MLflow: a spool on disk that training writes, and the tracker that uploads it."""

from pipeline.tracking.server import (
    artifact_location,
    connect,
    first_line,
    metric_name,
    prepare_mlflow,
    server_errors,
    use_server,
)
from pipeline.tracking.spool import (
    SAME,
    SETTING,
    Spool,
    SpoolReader,
    SpoolRecord,
)
from pipeline.tracking.tracker import (
    BATCH,
    PARAM_LENGTH,
    PARAMS,
    RETRY_SECONDS,
    Tracker,
)

__all__ = [
    "BATCH",
    "PARAMS",
    "PARAM_LENGTH",
    "RETRY_SECONDS",
    "SAME",
    "SETTING",
    "Spool",
    "SpoolReader",
    "SpoolRecord",
    "Tracker",
    "artifact_location",
    "connect",
    "first_line",
    "metric_name",
    "prepare_mlflow",
    "server_errors",
    "use_server",
]
