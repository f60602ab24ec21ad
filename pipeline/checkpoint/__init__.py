"""Checkpoints that belong to no world size and no ZeRO stage; this package alone writes and finds them."""

from pipeline.checkpoint.find import (
    all_whole,
    newest_whole,
    set_aside,
)
from pipeline.checkpoint.optimizer import (
    MOMENTS,
    gather_moments,
    group_settings,
    on_host,
    restore_optimizer,
)
from pipeline.checkpoint.save import (
    clean,
    save,
)
from pipeline.checkpoint.state import (
    FORMAT,
    MODEL,
    NAME,
    OPTIMIZER,
    STATE,
    DamagedError,
    State,
    check_weights,
    checked_sum,
    checkpoints,
    latest,
    load_model_weights,
    read_state,
)

__all__ = [
    "FORMAT",
    "MODEL",
    "MOMENTS",
    "NAME",
    "OPTIMIZER",
    "STATE",
    "DamagedError",
    "State",
    "all_whole",
    "check_weights",
    "checked_sum",
    "checkpoints",
    "clean",
    "gather_moments",
    "group_settings",
    "latest",
    "load_model_weights",
    "newest_whole",
    "on_host",
    "read_state",
    "restore_optimizer",
    "save",
    "set_aside",
]
