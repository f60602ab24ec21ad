"""Versions of a registered model in MLflow."""

from pipeline.registry.package import (
    REQUIREMENTS,
    SERVED,
    log_model,
    requirements,
    write_model,
)
from pipeline.registry.register import (
    KEY_TAG,
    METRIC_TAG,
    Registration,
    register,
)
from pipeline.registry.versions import (
    CHAMPION,
    VAL_TAG,
    find_champion,
    make_version,
    open_detector,
)

__all__ = [
    "CHAMPION",
    "KEY_TAG",
    "METRIC_TAG",
    "REQUIREMENTS",
    "SERVED",
    "VAL_TAG",
    "Registration",
    "find_champion",
    "log_model",
    "make_version",
    "open_detector",
    "register",
    "requirements",
    "write_model",
]
