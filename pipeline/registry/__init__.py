"""Versions of a registered model in MLflow."""

from pipeline.registry.register import (
    CHAMPION,
    ENTRY,
    KEY_TAG,
    METRIC_TAG,
    REQUIREMENTS,
    VAL_TAG,
    Registration,
    register,
    requirements,
    write_model,
)

__all__ = [
    "CHAMPION",
    "ENTRY",
    "KEY_TAG",
    "METRIC_TAG",
    "REQUIREMENTS",
    "VAL_TAG",
    "Registration",
    "register",
    "requirements",
    "write_model",
]
