"""A run on its way to MLflow: spools and an outbox on disk, and the tracker that uploads them."""

from pipeline.tracking.names import legal_names, metric_name
from pipeline.tracking.outbox import Operation, Outbox
from pipeline.tracking.server import (
    artifact_location,
    connect,
    error_code,
    first_line,
    is_refusal,
    page,
    prepare_mlflow,
    server_errors,
    use_server,
    why,
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
    "Operation",
    "Outbox",
    "Spool",
    "SpoolReader",
    "SpoolRecord",
    "Tracker",
    "artifact_location",
    "connect",
    "error_code",
    "first_line",
    "is_refusal",
    "legal_names",
    "metric_name",
    "page",
    "prepare_mlflow",
    "server_errors",
    "use_server",
    "why",
]
