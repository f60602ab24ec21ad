"""Gradients that the ranks average while the backward pass still computes others, at ZeRO stage 0.

DeepSpeed does so at other stages (`overlap_comm`); at 0 it begins when the backward pass has ended. Torch's
`DistributedDataParallel` looks for unused parameters behind what the network gives, not behind its losses, cuts
compiled graphs at its buckets, and has no gradient, where DeepSpeed has 0, for what no rank has used.

The buckets and their order follow from the network alone, so all ranks begin the same sums in the same order, in the
first step after a resume as in any other.
"""

from collections.abc import Callable
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import nn

from pipeline.distributed import World, begin_sum_over_ranks

BUCKETS = 4
"""Parts of about equal size. With more of them less is left for the end; each is one more message to wait for, which at
hundreds of ranks is more than that."""


def reduce_early(engine: Any, world: World) -> None:
    """Have a DeepSpeed engine of stage 0 reduce its gradients so, with the last micro-batch of a step.

    Where DeepSpeed would begin, it calls what waits for the end. Its settings of the type and the scale of what is sent
    hold.
    """
    if engine.zero_optimization_stage() == 0:
        engine.buffered_allreduce_fallback = Reducer(engine, world).finish


def buckets_of(module: nn.Module, number: int = BUCKETS) -> list[list[nn.Parameter]]:
    """The parameters that are trained, the last first, as a backward pass comes to them, in `number` parts at most."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad][::-1]
    *begins, total = accumulate((parameter.numel() for parameter in parameters), initial=0)
    numbered = zip((begin * number // max(total, 1) for begin in begins), parameters, strict=True)
    return [[parameter for _, parameter in part] for _, part in groupby(numbered, key=lambda pair: pair[0])]


class Reducer:
    """Averages the gradients of a step bucket by bucket, each as soon as it and those before it are full.

    A parameter that the backward pass does not come to, as where a path was dropped, holds its bucket and those behind
    it back until the end, on this rank alone; its gradient is then 0, as DeepSpeed has it.
    """

    def __init__(self, engine: Any, world: World) -> None:
        self._engine, self._world = engine, world
        self._buckets = buckets_of(engine.module)
        average = 1 / world.size if engine.gradient_average else 1.0
        self._before = 1 / engine.gradient_predivide_factor() if engine.postscale_gradients() else average
        self._after = average / self._before
        self._begin_step()
        if world.size > 1:
            for number, bucket in enumerate(self._buckets):
                for parameter in bucket:
                    parameter.register_post_accumulate_grad_hook(self._arrival(number))  # type: ignore[no-untyped-call]

    def _begin_step(self) -> None:
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sums: list[Callable[[], torch.Tensor]] = []

    def _arrival(self, number: int) -> Callable[[torch.Tensor], None]:
        def arrived(parameter: torch.Tensor) -> None:
            if self._engine.is_gradient_accumulation_boundary():
                self._missing[number] -= 1
                while len(self._sums) < len(self._buckets) and self._missing[len(self._sums)] == 0:
                    self._begin()

        return arrived

    def _begin(self) -> None:
        """Begin to sum the next bucket."""
        gradients = [parameter.grad for parameter in self._buckets[len(self._sums)] if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients]).to(self._engine.communication_data_type)
        if self._before != 1:
            flat.mul_(self._before)
        self._sums.append(begin_sum_over_ranks(self._world, flat))

    def finish(self, grads: None = None, elements_per_buffer: int = 0) -> None:
        """Begin what has not begun and wait for all, so that every parameter has its gradient of the step.

        Args:
            grads: nothing, as DeepSpeed gives it.
            elements_per_buffer: of DeepSpeed's own buckets, not used.
        """
        for parameter in (parameter for bucket in self._buckets for parameter in bucket):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self._world.size == 1:
            return
        while len(self._sums) < len(self._buckets):
            self._begin()
        for bucket, wait in zip(self._buckets, self._sums, strict=True):
            gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
            parts = wait().mul_(self._after).split_with_sizes([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
        self._begin_step()
