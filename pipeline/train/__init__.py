"""Training under DeepSpeed, resumable at any step; `python -m pipeline.train` runs it without Ray."""

from pipeline.train.cards import (
    CARDS,
    Card,
    card_of_device,
    find_card,
)
from pipeline.train.curves import (
    Curves,
)
from pipeline.train.ema import (
    WeightAverage,
    decay_after,
    make_average,
)
from pipeline.train.engine import (
    engine_config,
    import_deepspeed,
    make_engine,
    take_step,
)
from pipeline.train.flops import (
    LeastTime,
    least_time,
    micro_batch,
)
from pipeline.train.initial import (
    LEAST_STEPS,
    check_init,
    hindrance,
    is_path,
    make_model,
)
from pipeline.train.loop import (
    dropout_seed,
)
from pipeline.train.loss_scale import (
    LossScale,
    loss_scale_of,
)
from pipeline.train.optim import (
    SAMPLING_MODULES,
    group_of,
    lr_factor,
    make_optimizer,
    parameter_groups,
    set_learning_rates,
)
from pipeline.train.reduce import (
    BUCKETS,
    reduce_early,
)
from pipeline.train.replay import (
    Replayed,
    ReplayedPart,
)
from pipeline.train.run import (
    MAY_DIFFER,
    Run,
    TrainJob,
    find_checkpoint,
    resume_point,
)
from pipeline.train.stop import (
    LOOK_SECONDS,
    StoppedError,
    StopRequest,
    end_of,
)

__all__ = [
    "BUCKETS",
    "CARDS",
    "LEAST_STEPS",
    "LOOK_SECONDS",
    "MAY_DIFFER",
    "SAMPLING_MODULES",
    "Card",
    "Curves",
    "LeastTime",
    "LossScale",
    "Replayed",
    "ReplayedPart",
    "Run",
    "StopRequest",
    "StoppedError",
    "TrainJob",
    "WeightAverage",
    "card_of_device",
    "check_init",
    "decay_after",
    "dropout_seed",
    "end_of",
    "engine_config",
    "find_card",
    "find_checkpoint",
    "group_of",
    "hindrance",
    "import_deepspeed",
    "is_path",
    "least_time",
    "loss_scale_of",
    "lr_factor",
    "make_average",
    "make_engine",
    "make_model",
    "make_optimizer",
    "micro_batch",
    "parameter_groups",
    "reduce_early",
    "resume_point",
    "set_learning_rates",
    "take_step",
]
