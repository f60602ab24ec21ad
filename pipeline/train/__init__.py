"""Training under DeepSpeed, resumable at any step; `python -m pipeline.train` runs it without Ray."""

from pipeline.train.curves import (
    Curves,
)
from pipeline.train.loop import (
    MAY_DIFFER,
    TrainJob,
    dropout_seed,
    engine_config,
    is_path,
    resume_point,
)
from pipeline.train.optim import (
    SAMPLING_MODULES,
    group_of,
    lr_factor,
    make_optimizer,
    parameter_groups,
    set_learning_rates,
)

__all__ = [
    "MAY_DIFFER",
    "SAMPLING_MODULES",
    "Curves",
    "TrainJob",
    "dropout_seed",
    "engine_config",
    "group_of",
    "is_path",
    "lr_factor",
    "make_optimizer",
    "parameter_groups",
    "resume_point",
    "set_learning_rates",
]
