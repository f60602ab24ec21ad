"""What a GPU holds in training at each ZeRO stage, as DeepSpeed's engine lays it out, and what a checkpoint is.

Weights, gradients and moments are fp32 at every precision; bf16 is autocast. From stage 1 on the optimizer has a copy
of its part of the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from pipeline.config.sections import TrainSection
from pipeline.train.optim import parameter_groups

FLOAT = 4
"""Bytes of an fp32 number."""
ALIGNMENT = 2
"""Elements that the part of a rank of a group is a multiple of, at stages 1 and 2."""
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Layout:
    """The tensors of a model, by the numbers of their elements, as the optimizer groups them."""

    groups: tuple[tuple[int, ...], ...]
    """Trained parameters, of each group in their order."""
    frozen: tuple[int, ...]
    """Parameters that are not trained."""
    buffers: int
    """Elements of all buffers."""
    saved: int
    """Elements of the state dict, where shared tensors stand under each of their names."""

    @property
    def parameters(self) -> int:
        """Elements of all parameters."""
        return self.trained + sum(self.frozen)

    @property
    def trained(self) -> int:
        """Elements of the trained parameters."""
        return sum(map(sum, self.groups))

    def checkpoint(self, average: bool) -> int:
        """Bytes of a checkpoint's tensors: weights, moments, and the moving average where there is one."""
        weights = (2 if average else 1) * self.saved
        return FLOAT * (weights + 2 * self.trained + sum(map(len, self.groups)))


def layout_of(model: Any, train: TrainSection) -> Layout:
    """The tensors of a model, which need no memory."""
    trained = parameter_groups(model, train)
    return Layout(
        groups=tuple(tuple(weight.numel() for weight in group["params"]) for group in trained),
        frozen=tuple(weight.numel() for weight in model.parameters() if not weight.requires_grad),
        buffers=sum(buffer.numel() for buffer in model.buffers()),
        saved=sum(tensor.numel() for tensor in model.state_dict().values()),
    )


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that holds most."""

    parameters: int
    """Weights, and the optimizer's copy of its part of them."""
    gradients: int
    """Gradients that stand while the next micro-batch is computed."""
    moments: int
    """AdamW's two moments."""
    average: int
    """The moving average of the weights."""
    buffers: int
    """Buffers of the model and of reductions, and at stage 3 the weights that are gathered."""
    activations: int
    """What the backward pass of a micro-batch needs."""
    workspace: int
    """What the backward pass has beside it at most."""

    @property
    def total(self) -> int:
        """All of it."""
        fixed = self.parameters + self.gradients + self.moments + self.average
        return fixed + self.buffers + self.activations + self.workspace


def memory_of_rank(
    layout: Layout,
    stage: int,
    ranks: int,
    *,
    activations: int,
    peak: int,
    bucket: int,
    average: bool,
    offload: bool = False,
) -> Memory:
    """What a rank holds.

    Args:
        layout: of the model.
        stage: of ZeRO.
        ranks: that share the work.
        activations: bytes that the backward pass of a micro-batch needs.
        peak: bytes at a time of a micro-batch at most.
        bucket: elements of DeepSpeed's buffers of reductions.
        average: whether there is a moving average of the weights.
        offload: whether the optimizer's state lies on the host, from stage 1 on. Gradients count as without.
    """
    whole = layout.trained
    if stage == 0:
        parameters, gradients, part, buffers = layout.parameters, whole, whole, 0
    elif stage < 3:
        parts = [-(-sum(group) // (ALIGNMENT * ranks)) * ALIGNMENT for group in layout.groups]
        part, buffers = sum(parts), bucket
        parameters = ranks * part + sum(layout.frozen) + part
        gradients = whole if stage == 1 else _most_reached(layout.groups, parts, ranks)
    else:
        part = sum(-(-size // ranks) for group in layout.groups for size in group)
        parameters = part + sum(-(-size // ranks) for size in layout.frozen) + part
        gradients, buffers = part, bucket + layout.parameters
    own_average = (part if stage == 3 else whole) if average else 0
    if offload and stage > 0:
        parameters, part = parameters - part, 0
    return Memory(
        parameters=FLOAT * parameters,
        gradients=FLOAT * gradients,
        moments=FLOAT * 2 * part,
        average=FLOAT * own_average,
        buffers=FLOAT * (buffers + layout.buffers),
        activations=activations,
        workspace=max(0, peak - activations),
    )


def _most_reached(groups: Sequence[Sequence[int]], parts: Sequence[int], ranks: int) -> int:
    """Elements of the parameters that the part of a rank reaches into, of the rank where they are most.

    At stage 2 a rank keeps the gradients of these whole.
    """
    reached = [0] * ranks
    for group, part in zip(groups, parts, strict=True):
        for begin, end in pairwise(accumulate(group, initial=0)):
            for rank in range(begin // part, -(-end // part)):
                reached[rank] += end - begin
    return max(reached)
