"""Checkpoints that belong to no world size and no ZeRO stage; this package alone writes and finds them."""

from pipeline.checkpoint.save import (
    FORMAT,
    MODEL,
    MOMENTS,
    OPTIMIZER,
    STATE,
    State,
    checkpoints,
    clean,
    group_settings,
    latest,
    load_model_weights,
    read_state,
    restore_optimizer,
    save,
)

__all__ = [
    "FORMAT",
    "MODEL",
    "MOMENTS",
    "OPTIMIZER",
    "STATE",
    "State",
    "checkpoints",
    "clean",
    "group_settings",
    "latest",
    "load_model_weights",
    "read_state",
    "restore_optimizer",
    "save",
]
