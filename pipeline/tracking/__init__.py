"""Metrics on their way to MLflow: a spool on disk that training writes, and the tracker that uploads it."""

from pipeline.tracking.tracker import (
    BATCH,
    PARAM_LENGTH,
    PARAMS,
    RETRY_SECONDS,
    Spool,
    SpoolReader,
    SpoolRecord,
    Tracker,
    artifact_location,
    connect,
    first_line,
    metric_name,
    prepare_mlflow,
    server_errors,
    use_server,
)

__all__ = [
    "BATCH",
    "PARAMS",
    "PARAM_LENGTH",
    "RETRY_SECONDS",
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
