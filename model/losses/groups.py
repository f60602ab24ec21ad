"""What the criterion is given: groups of predictions, each with the objects that it is to find.

Shapes: B batch, Q queries, C logits, n objects of an image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Targets = Sequence[Mapping[str, Tensor]]
"""Of each image `labels` int64 [n] and `boxes` [n, 4] cxcywh in 0..1, on the device."""
Matches = list[tuple[Tensor, Tensor]]
"""Of each image the indices of matched queries and of their objects, int64 on the host, in the order of the queries."""


@dataclass(frozen=True)
class Group:
    """Predictions that are matched and scored on their own.

    One-to-many matching is a group whose targets are repeated; denoising queries are one whose matching is given.
    """

    outputs: Mapping[str, Any]
    """`pred_logits` [B, Q, C] and `pred_boxes` [B, Q, 4] cxcywh; what else there is plays no part."""
    targets: Targets
    """What to find. Groups that share it, the object itself, share the work on it."""
    suffix: str = ""
    """What the names of its losses end in."""
    matching: Matches | None = None
    """Which query has which object; one to one by the least cost when None."""
    weight: float = 1.0
    """Factor on the weights of its losses; 1 / k suits targets that are repeated k times."""


def groups_of(outputs: Mapping[str, Any], targets: Targets) -> list[Group]:
    """The groups of what a model gives: the last decoder layer, each one before it (`_0`, ...), the proposals (`_enc`).

    For the proposals every object has the label 0: theirs is the question whether there is an object.
    """
    groups = [Group(outputs, targets)]
    groups += [Group(layer, targets, f"_{index}") for index, layer in enumerate(outputs.get("aux_outputs", ()))]
    if "enc_outputs" in outputs:
        objects = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
        groups.append(Group(outputs["enc_outputs"], objects, "_enc"))
    return groups


def distinct_targets(groups: Sequence[Group]) -> dict[int, Targets]:
    """The targets of the groups, by `id`, each once."""
    return {id(group.targets): group.targets for group in groups}
