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
    restore_optimizer,
)
from pipeline.checkpoint.save import (
    CheckpointWriter,
    clean,
)
from pipeline.checkpoint.state import (
    EMA,
    FORMAT,
    MODEL,
    NAME,
    OPTIMIZER,
    STATE,
    DamagedError,
    Scaling,
    State,
    checked_sum,
    checkpoints,
    latest,
    load_model_weights,
    read_state,
    weights_in,
)
from pipeline.checkpoint.weights import (
    differing_weights,
    gather_weights,
    on_host,
    restore_averages,
    trained_weights,
)

__all__ = [
    "EMA",
    "FORMAT",
    "MODEL",
    "MOMENTS",
    "NAME",
    "OPTIMIZER",
    "STATE",
    "CheckpointWriter",
    "DamagedError",
    "Scaling",
    "State",
    "all_whole",
    "checked_sum",
    "checkpoints",
    "clean",
    "differing_weights",
    "gather_moments",
    "gather_weights",
    "group_settings",
    "latest",
    "load_model_weights",
    "newest_whole",
    "on_host",
    "read_state",
    "restore_averages",
    "restore_optimizer",
    "set_aside",
    "trained_weights",
    "weights_in",
]
