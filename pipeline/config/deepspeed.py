"""DeepSpeed settings of one's own: what they may not say, and how they join those that follow from `train`."""

from collections.abc import Mapping
from typing import Any

from pipeline.config.values import flatten

OWNED = {
    "train_batch_size": "follows from train.global_batch",
    "train_micro_batch_size_per_gpu": "follows from train.micro_batch",
    "gradient_accumulation_steps": "follows from train.global_batch",
    "managed_gradient_accumulation": "a step is a whole global batch",
    "gradient_clipping": "follows from train.clip_grad_norm",
    "zero_force_ds_cpu_optimizer": "follows from train.offload",
    "optimizer": "follows from train.lr and train.weight_decay",
    "scheduler": "follows from train.lr_drop_epochs and train.warmup_steps",
    "fp16": "follows from train.precision",
    "bf16": "follows from train.precision",
    "amp": "follows from train.precision",
    "torch_autocast": "follows from train.precision",
    "data_types": "gradients are added up in fp32",
    "zero_optimization.stage": "follows from train.zero_stage",
    "zero_optimization.round_robin_gradients": "permutes the optimizer's state, which checkpoints have by name",
    "zero_optimization.offload_optimizer": "follows from train.offload",
    "zero_optimization.offload_param": "checkpoints do not find the weights there",
}
"""Keys that are not the user's, or all below them, and why."""


def refused(settings: Mapping[str, Any]) -> list[str]:
    """The keys of `settings` that are not the user's, with the reasons."""
    given = [f"{key}." for key in flatten(settings)]

    def sets(key: str) -> bool:
        """Whether a key, something below it, or a value in place of its whole section is given."""
        return key in settings or any(name.startswith(f"{key}.") or f"{key}.".startswith(name) for name in given)

    return [f"{key} ({why})" for key, why in OWNED.items() if sets(key)]


def merged(base: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `settings` in it, section by section."""
    result = dict(base)
    for key, value in settings.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result
