"""The optimizer: parameter groups, AdamW and the learning rate as a pure function of the step.

| group    | parameters                                            | learning rate                |
|----------|-------------------------------------------------------|------------------------------|
| main     | everything else                                       | lr                           |
| sampling | `reference_points` and `sampling_offsets` projections | lr * lr_sampling_factor      |
| backbone | below `backbone.`                                     | lr_backbone                  |

With `train.scale_lr` all three are multiplied by `train.lr_scale`, the recipe for batches of another size than the one
that the rates are stated for. Weight decay is on all parameters, norms, biases and embeddings included (Deformable
DETR, main.py of the original).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.config.sections import TrainSection

SAMPLING_MODULES = ("reference_points", "sampling_offsets")


def group_of(name: str) -> str:
    """The group that a parameter belongs to, by its name in the state dict."""
    parts = name.split(".")
    if parts[0] == "backbone":
        return "backbone"
    return "sampling" if any(module in parts for module in SAMPLING_MODULES) else "main"


def parameter_groups(model: nn.Module, train: TrainSection) -> list[dict[str, Any]]:
    """Optimizer groups of all trainable parameters; groups without any are left out.

    Each has `name`, `names` (of its parameters, in order), `params`, `lr`, `base_lr` (what the schedule scales) and
    `weight_decay`.
    """
    rates = {"main": train.lr, "sampling": train.lr * train.lr_sampling_factor, "backbone": train.lr_backbone}
    rates = {group: rate * train.lr_scale for group, rate in rates.items()}
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups: list[dict[str, Any]] = []
    for group, rate in rates.items():
        names = [name for name in trainable if group_of(name) == group]
        if names:
            groups.append(
                {
                    "name": group,
                    "names": names,
                    "params": [trainable[name] for name in names],
                    "lr": rate,
                    "base_lr": rate,
                    "weight_decay": train.weight_decay,
                }
            )
    grouped = [name for group in groups for name in group["names"]]
    assert sorted(grouped) == sorted(trainable), "the groups must partition the trainable parameters"
    assert len({id(parameter) for group in groups for parameter in group["params"]}) == len(trainable)
    return groups


def make_optimizer(groups: Sequence[dict[str, Any]]) -> torch.optim.AdamW:
    """Torch's AdamW, which compiles nothing, with the betas and epsilon of its paper; one kernel for all parameters."""
    return torch.optim.AdamW([dict(group) for group in groups], betas=(0.9, 0.999), eps=1e-8, fused=True)


def lr_factor(step: int, *, samples: int, global_batch: int, drop_epochs: Iterable[float], warmup_steps: int) -> float:
    """What the base learning rates are multiplied by at optimizer step `step` (from 0).

    Linear warm-up, reaching 1 at step `warmup_steps`, and a factor 0.1 from the first step that begins at or after each
    of `drop_epochs`.

    Args:
        step: number of the step.
        samples: images of the training split.
        global_batch: images of a step.
        drop_epochs: epochs, fractions allowed.
        warmup_steps: steps of the warm-up; 0 for none.
    """
    drops = sum(step * global_batch >= epoch * samples for epoch in drop_epochs)
    return min(1.0, (step + 1) / (warmup_steps + 1)) * 0.1**drops


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale the base learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
