"""The scale of the loss in fp16, without which small gradients would be 0 and large ones infinite.

DeepSpeed multiplies the loss by it, divides the gradients by it, and leaves out a step whose gradients have overflowed.
What it is in the next step is decided here, after the step and alike on all ranks, from the norm that they share:
DeepSpeed's own scale grows in the middle of a step, and its scalers of autocast clip gradients that are still scaled.
"""

import math
from dataclasses import replace
from typing import Any

import torch

from pipeline.checkpoint.state import Scaling
from pipeline.log import get_logger

WINDOW = 1000
"""Steps without an overflow after which the scale doubles."""
LEAST = 1.0
"""Scale at which an overflow is not for the scale to mend."""

logger = get_logger(__name__)


class LossScale:
    """The scale as DeepSpeed's engine (stage 0) and its ZeRO optimizers ask for it.

    Args:
        scaling: where it stands.
        ranks: by which gradients are divided when they are averaged, and a rank's losses are multiplied before that; as
            the scale is of the losses that add up to the global batch's, it overflows alike at any number of them.
    """

    def __init__(self, scaling: Scaling, ranks: int) -> None:
        self.scaling, self._ranks = scaling, ranks

    @property
    def cur_scale(self) -> float:
        """What this rank multiplies with in this step."""
        return self.scaling.factor / self._ranks

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss, scaled."""
        return loss * self.cur_scale

    scale_loss = scale

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer of stage 0 step; its gradients are not scaled any more."""
        optimizer.step()

    def update(self) -> None:
        """Nothing: `follow` decides."""

    def update_scale(self, overflow: bool) -> None:
        """Nothing: `follow` decides."""

    def follow(self, step: int, norm: float) -> Scaling:
        """Decide on the scale of the next step.

        Args:
            step: number of the one that is done.
            norm: of its gradient; not finite where it has overflowed.

        Returns:
            Where it stands then.
        """
        before = self.scaling
        if not math.isfinite(norm):
            self.scaling = Scaling(max(LEAST, before.factor / 2), steady=0, overflows=before.overflows + 1)
            logger.info("step %d: the gradient overflows at a loss scale of %g: left out", step, before.factor)
        elif before.steady + 1 == WINDOW:
            self.scaling = replace(before, factor=before.factor * 2, steady=0)
        else:
            self.scaling = replace(before, steady=before.steady + 1)
        return self.scaling

    def mends(self, norm: float) -> bool:
        """Whether a gradient that is not finite may be finite at a smaller scale."""
        return not math.isfinite(norm) and self.scaling.factor > LEAST


def install(engine: Any, scaling: Scaling | None, ranks: int) -> None:
    """Have a DeepSpeed engine scale its losses so, or not at all.

    Its own scalers go: it makes them for every engine of a process that has had one in fp16.
    """
    scale = LossScale(scaling, ranks) if scaling is not None else None
    if engine.zero_optimization_stage() == 0:
        engine.torch_autocast_z0_gradscaler = scale
    else:
        engine.optimizer.torch_autocast_gradscaler = None
        if scale is not None:
            engine.optimizer.loss_scaler = scale


def loss_scale_of(engine: Any) -> LossScale | None:
    """The scale of an engine; None but in fp16."""
    is_whole = engine.zero_optimization_stage() == 0
    scale = engine.torch_autocast_z0_gradscaler if is_whole else engine.optimizer.loss_scaler
    return scale if isinstance(scale, LossScale) else None
