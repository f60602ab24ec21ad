"""The measured speed of a network: a few micro-batches of training in this process, and what follows for others."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from model.batch import ImageBatch
from model.complexity import OBJECTS
from model.config import DetrConfig
from model.denoising import DRAWS, add_noise
from model.losses.criterion import Criterion
from model.losses.groups import groups_of
from model.memory import kept_for_backward
from pipeline.config.sections import InitSection, TrainSection
from pipeline.config.values import differences, plain
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.train.flops import micro_batch
from pipeline.train.initial import make_model
from pipeline.train.optim import make_optimizer, parameter_groups
from pipeline.train.run import TrainJob

Clock = Callable[[], float]

REPEATS = 5
"""Timed micro-batches of a size, after one that warms up."""
SETTINGS = ("precision", "freeze_backbone", "activation_checkpointing", "compile")
"""Settings of training that a profile is for, beside the network's."""


@dataclass(frozen=True)
class Point:
    """One micro-batch."""

    images: int
    height: int
    width: int
    """Of the canvas, in pixels."""
    flops: int
    """As they are counted."""
    seconds: float
    """Median time of the forward pass, the losses and the backward pass."""
    activations: int
    """Bytes that autograd kept for the backward pass."""


@dataclass(frozen=True)
class Profile:
    """What was measured of a network on a device."""

    device: str
    """Its name."""
    settings: dict[str, Any]
    """The network's and training's that it is for."""
    points: tuple[Point, ...]
    """Micro-batches of several sizes."""
    optimizer: float
    """Seconds of clipping and of the optimizer's step."""

    def seconds(self, flops: float) -> float:
        """Time of a micro-batch of so many operations: a line through the points, none of whose parts is negative."""
        fixed, slope = self._line
        return fixed + slope * flops

    @cached_property
    def _line(self) -> tuple[float, float]:
        flops = np.array([point.flops for point in self.points], dtype=np.float64)
        seconds = np.array([point.seconds for point in self.points])
        # Divided by the measured times, so that the relative errors are least.
        (fixed, slope), *_ = np.linalg.lstsq(np.stack([1 / seconds, flops / seconds], axis=1), np.ones_like(seconds))
        if len(set(flops)) < 2 or fixed < 0 or slope < 0:
            fixed, slope = 0.0, float(np.mean(seconds / flops))
        return float(fixed), float(slope)


def profile_settings(architecture: DetrConfig, train: TrainSection) -> dict[str, Any]:
    """What a profile has to have been measured with."""
    section = plain(train)
    return {"model": plain(architecture), "train": {name: section[name] for name in SETTINGS}}


def read_profile(path: Path, settings: dict[str, Any]) -> Profile:
    """The profile in a file.

    Args:
        path: what `raydetr plan --measure` wrote.
        settings: those that are planned, of `profile_settings`.

    Raises:
        UserError: there is none, it is not a profile, or one of another network.
    """
    content = read_json(path, "profile")
    try:
        points = tuple(Point(**point) for point in content.pop("points"))
        profile = Profile(points=points, **content)
        if not points or min(profile.optimizer, *(min(point.flops, point.seconds) for point in points)) <= 0:
            raise ValueError("no times in it")
        changed = differences(profile.settings, settings)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not a profile ({error}); make one with raydetr plan --measure") from None
    if changed:
        raise UserError(f"{path} was measured with other settings ({'; '.join(changed)}): measure these with --measure")
    return profile


def measure_profile(
    job: TrainJob, canvases: Sequence[tuple[int, int]], device: torch.device, clock: Clock = time.perf_counter
) -> Profile:
    """Train on random images for a few micro-batches of every size.

    Args:
        job: the network and how it is trained; its data is not read, nor its initial weights.
        canvases: height and width of each size, in pixels.
        device: where.
        clock: gives seconds.
    """
    train = job.train.model_copy(update={"init": InitSection()})
    alone = World(rank=0, size=1, local_rank=0, device=device)
    model = make_model(TrainJob(job.model, train, job.shards, job.out), None, alone).to(device)
    optimizer = make_optimizer(parameter_groups(model, train))
    criterion = Criterion(train.criterion, job.model.class_loss)
    points = tuple(_measured(model, criterion, job, canvas, device, clock) for canvas in canvases)

    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), train.clip_grad_norm or 1.0, foreach=True)
        optimizer.step()

    return Profile(_name(device), profile_settings(job.model, train), points, _median(update, device, clock))


def _measured(
    model: nn.Module, criterion: Criterion, job: TrainJob, canvas: tuple[int, int], device: torch.device, clock: Clock
) -> Point:
    train, (height, width) = job.train, canvas
    images = train.micro_batch
    mask = torch.zeros(images, height, width, dtype=torch.bool, device=device)
    batch = ImageBatch(torch.randn(images, 3, height, width, device=device), mask)
    boxes = 0.25 + 0.5 * torch.rand(OBJECTS, 4, device=device)
    targets = [{"labels": torch.zeros(OBJECTS, dtype=torch.int64, device=device), "boxes": boxes}] * images

    noised = None
    if job.model.denoising is not None:
        draws = np.random.default_rng(0).random((images, job.model.denoising.queries, DRAWS))
        noised = add_noise(targets, job.model.denoising, job.model.num_classes, draws)

    kind = micro_batch(job.model, train, canvas).autocast

    def loss() -> torch.Tensor:
        with torch.autocast(device.type, kind, enabled=kind is not None):
            outputs = model(batch) if noised is None else model(batch, noised)
        groups = groups_of(outputs, targets, job.model.one_to_many, noised)
        return criterion(groups, float(OBJECTS * images), train.global_batch).total()

    with kept_for_backward([*model.parameters(), *model.buffers()]) as kept:
        first = loss()
    activations = sum(kept.values())
    first.backward()  # type: ignore[no-untyped-call]
    del first
    seconds = _median(lambda: loss().backward(), device, clock)  # type: ignore[no-untyped-call]
    flops = round(micro_batch(job.model, train, canvas).work().flops)
    return Point(images, height, width, flops, seconds, activations)


def _median(call: Callable[[], object], device: torch.device, clock: Clock) -> float:
    """Median seconds of a call, after one that warms up."""
    times = []
    for _ in range(REPEATS + 1):
        begin = clock()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - begin)
    return statistics.median(times[1:])


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'' if threads == 1 else 's'}"
