"""One step of a run once more, in one process, with everything about it told and nothing of the run changed.

A step is a function of the weights before it and of its number, so it needs no record but a checkpoint: the steps
between that and the wanted one are done again.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from model.losses.criterion import Criterion
from pipeline.checkpoint.state import State
from pipeline.data.loader import MicroBatch, Step, TrainLoader, prepare_workers
from pipeline.data.manifest import read_manifest
from pipeline.data.order import SampleOrder
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.train.engine import make_engine, take_step
from pipeline.train.loop import backward_each, summed
from pipeline.train.loss_scale import loss_scale_of
from pipeline.train.optim import set_learning_rates
from pipeline.train.run import Run, TrainJob


@dataclass(frozen=True)
class ReplayedPart:
    """A micro-batch of the step: its images as the network saw them, and its share of the step's losses."""

    micro: MicroBatch
    losses: dict[str, float]


@dataclass(frozen=True)
class Replayed:
    """What a step did.

    Attributes:
        step: its number, from 0.
        redone: steps between the checkpoint and it.
        parts: its micro-batches.
        losses: those of the global batch, `loss` their weighted sum.
        grad_norm: that of all gradients, before they are clipped.
        gradients: the norm of each parameter's gradient, the greatest first.
        not_finite: modules whose output holds a number that is not finite, in the order they ran.
    """

    step: int
    redone: int
    parts: list[ReplayedPart]
    losses: dict[str, float]
    grad_norm: float
    gradients: dict[str, float]
    not_finite: list[str]


def replay(
    job: TrainJob,
    world: World,
    number: int,
    found: tuple[Path, State] | None,
    on_step: Callable[[int], None] = lambda step: None,
) -> Replayed:
    """Do a step of a run once more.

    Args:
        job: the run; nothing is written into its folder.
        world: this process alone.
        number: of the step, from 0.
        found: a checkpoint after `number` steps at most, and its state; None begins where training did.
        on_step: called with the number of each step before the wanted one.

    Raises:
        UserError: the schedule has no such step, or its data cannot be read.
    """
    # What is cut, or not seen from outside, tells less.
    alone = {"zero_stage": 0, "offload": "none", "deepspeed": {}, "compile": False}
    job = replace(job, train=job.train.model_copy(update=alone))
    run = Run(job, world, read_manifest(job.shards, job.cache))
    if not 0 <= number < run.total:
        raise UserError(f"step {number}: the schedule has the steps 0 to {run.total - 1}")
    first = found[1].step if found else 0
    prepare_workers(job.train.loader_workers)
    order = SampleOrder(run.manifest.digest, run.manifest.shard_sizes, job.train.seed, job.train.window)
    steps = TrainLoader(run.manifest, order, job.train, world.rank, world.size, first, number + 1, job.on_error)
    engine = make_engine(run, found)
    criterion, scale = Criterion(job.train.criterion, job.model.class_loss), loss_scale_of(engine)
    try:
        for step in steps:
            set_learning_rates(engine.basic_optimizer, run.factor(step.step))
            if step.step == number:
                return _told(engine, criterion, step, number - first, run)
            on_step(step.step)
            summed(losses for _, losses in backward_each(engine, criterion, step, _boxes(step), run))
            norm = take_step(engine, job.train.clip_grad_norm)
            if scale is not None:
                scale.follow(step.step, float(norm))
    finally:
        engine.destroy()
    raise AssertionError("the loader ends with the wanted step")


def _told(engine: Any, criterion: Criterion, step: Step, redone: int, run: Run) -> Replayed:
    not_finite: list[str] = []
    with _watched(engine.module, not_finite):
        parts = list(backward_each(engine, criterion, step, _boxes(step), run))
    scale = loss_scale_of(engine)
    gradients = {
        name: float(parameter.grad.float().norm()) / (scale.cur_scale if scale else 1.0)
        for name, parameter in engine.module.named_parameters()
        if parameter.grad is not None
    }
    return Replayed(
        step=step.step,
        redone=redone,
        parts=[ReplayedPart(micro, _floats(losses)) for micro, losses in parts],
        losses=_floats(summed(losses for _, losses in parts)),
        grad_norm=float(take_step(engine, run.job.train.clip_grad_norm)),
        gradients=dict(sorted(gradients.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])[::-1]),
        not_finite=not_finite,
    )


def _boxes(step: Step) -> float:
    return float(sum(len(target["labels"]) for micro in step.micro_batches for target in micro.targets))


def _floats(losses: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(loss) for name, loss in losses.items()}


@contextmanager
def _watched(module: nn.Module, not_finite: list[str]) -> Iterator[None]:
    """Names in the block, as they run, the modules whose output is not finite."""

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            floats = [
                leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
            ]
            if name not in not_finite and not all(torch.isfinite(tensor).all() for tensor in floats):
                not_finite.append(name)

        return hook

    handles = [part.register_forward_hook(look(name)) for name, part in module.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
