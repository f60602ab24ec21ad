"""Versions of a registered model in MLflow."""

from pipeline.registry.lock import (
    LEASE,
    registry_lock,
)
from pipeline.registry.package import (
    REQUIREMENTS,
    SERVED,
    log_model,
    own_models,
    requirements,
    write_model,
)
from pipeline.registry.register import (
    METRIC_TAG,
    VERSION,
    Registration,
    register,
    register_version,
)
from pipeline.registry.versions import (
    CHAMPION,
    KEY_TAG,
    VAL_TAG,
    find_champion,
    find_version,
    make_version,
    open_detector,
)

__all__ = [
    "CHAMPION",
    "KEY_TAG",
    "LEASE",
    "METRIC_TAG",
    "REQUIREMENTS",
    "SERVED",
    "VAL_TAG",
    "VERSION",
    "Registration",
    "find_champion",
    "find_version",
    "log_model",
    "make_version",
    "open_detector",
    "own_models",
    "register",
    "register_version",
    "registry_lock",
    "requirements",
    "write_model",
]
