"""The optimizer: parameter groups, AdamW and the learning rate as a pure function of the step.

| group    | parameters                                            | learning rate                |
|----------|-------------------------------------------------------|------------------------------|
| main     | everything else                                       | lr                           |
| sampling | `reference_points` and `sampling_offsets` projections | lr * lr_sampling_factor      |
| backbone | below `backbone.`                                     | lr_backbone                  |

With `train.layer_decay` the backbone has a group for each block, `backbone` for the last, `backbone-1` for the one
before it and so on to the stem: each has layer_decay times the rate of the block after it. With `train.scale_lr` all
rates are multiplied by `train.lr_scale`, the recipe for batches of another size than the one that they are stated for.
Weight decay is on all parameters, norms, biases and embeddings included (Deformable DETR, main.py of the original).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from model.backbones.backbone import Backbone
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
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    group_of_name = {name: group_of(name) for name in trainable}
    if train.layer_decay < 1:
        for block, names in _backbone_blocks(model, trainable).items():
            rates[f"backbone-{block}"] = train.lr_backbone * train.layer_decay**block
            group_of_name |= dict.fromkeys(names, f"backbone-{block}")
    rates = {group: rate * train.lr_scale for group, rate in rates.items()}
    groups: list[dict[str, Any]] = []
    for group, rate in rates.items():
        names = [name for name in trainable if group_of_name[name] == group]
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


def _backbone_blocks(model: nn.Module, names: Iterable[str]) -> dict[int, list[str]]:
    """Names of the backbone's parameters by how many blocks there are above them, those with none left out."""
    backbone = model.get_submodule("backbone")
    assert isinstance(backbone, Backbone)
    blocks: dict[int, list[str]] = {}
    for name in names:
        if group_of(name) == "backbone":
            blocks.setdefault(backbone.blocks_above(name.removeprefix("backbone.")), []).append(name)
    return {block: blocks[block] for block in sorted(blocks) if block}


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
