"""The moving average of the weights over the steps (Polyak averaging), which is what is evaluated and registered."""

from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint.state import EMA, State, load_model_weights
from pipeline.checkpoint.weights import restore_averages, trained_weights
from pipeline.distributed import World, together
from pipeline.errors import UserError
from pipeline.train.run import Run


def decay_after(steps: int, decay: float) -> float:
    """What is kept of the average in step number `steps`, from 1: little at first, so that it forgets the initial
    weights.
    """
    return min(decay, (1 + steps) / (10 + steps))


class WeightAverage:
    """Averages of the trained parameters; frozen ones and buffers stay what they are, and cost nothing here.

    Args:
        engine: the DeepSpeed engine, whose weights it begins with.
        world: this process.
        decay: of the exponential average, which `decay_after` lets rise to it.
    """

    def __init__(self, engine: Any, world: World, decay: float) -> None:
        self._engine, self._world, self._decay = engine, world, decay
        self.weights = {name: weight.clone() for name, weight in trained_weights(engine).items()}
        """By name; at ZeRO stage 3 this rank's parts."""

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the weights after `steps` steps."""
        current = list(trained_weights(self._engine).values())
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - decay_after(steps, self._decay))

    def restore(self, path: Path) -> None:
        """Go on from the averages of a checkpoint.

        Raises:
            UserError: its file is missing, damaged, or of another model.
        """
        try:
            restore_averages(self._engine, self._world, self.weights, load_model_weights(path, EMA))
        except ValueError as error:
            raise UserError(f"{path / EMA}: not the averages of its model: {error}; go on from another") from error


def make_average(engine: Any, run: Run, found: tuple[Path, State] | None) -> WeightAverage | None:
    """The average that the run keeps, if it keeps one; that of the checkpoint where it goes on."""
    if run.job.train.ema is None:
        return None
    average = WeightAverage(engine, run.world, run.job.train.ema)
    if found is not None:
        together(run.world, lambda: average.restore(found[0]))
    return average
