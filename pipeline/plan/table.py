"""A plan: what a schedule costs at several numbers of GPUs, from what is counted, measured or assumed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from model.complexity import Work, skeleton
from model.config import DetrConfig
from pipeline.config.sections import TrainSection
from pipeline.plan.data import PlannedData, draw_canvases
from pipeline.plan.memory import FLOAT, STAGES, Layout, Memory, layout_of, memory_of_rank
from pipeline.plan.profile import Profile
from pipeline.plan.speed import Exchange, Link
from pipeline.train.cards import Card
from pipeline.train.engine import engine_config
from pipeline.train.flops import micro_batch

GPUS_OF_NODE = 8
NETWORK = 25e9
"""Bytes a second that a GPU sends to another machine: 200 Gbit/s."""
LATENCY = 10e-6
"""Seconds of a message between GPUs."""
ADAMW_PASSES = 7
"""fp32 numbers that AdamW reads of a weight (itself, its gradient, two moments) and writes (all but the gradient)."""


@dataclass(frozen=True)
class Checkpoints:
    """What a schedule writes."""

    bytes: int
    """Of one, without what is beside the tensors."""
    written: int
    """How many there will have been."""
    kept: int
    """How many stay at most: the newest, and the best; while one is written there is one more."""


@dataclass(frozen=True)
class Row:
    """The schedule at one number of GPUs."""

    gpus: int
    nodes: int
    micro_batches: int
    """Of a GPU in a step."""
    compute: float
    """Seconds of a step that a GPU computes, the optimizer included."""
    communication: float
    """Seconds of a step that it waits for the others."""
    hours: float
    """Of the schedule."""
    cost: float | None
    """Price of all GPU-hours."""
    node_bytes: float
    """Bytes of shards that a machine reads in an epoch."""
    memory: tuple[Memory, ...]
    """Of a GPU at each ZeRO stage."""

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.compute + self.communication

    @property
    def gpu_hours(self) -> float:
        """Hours of all GPUs together."""
        return self.gpus * self.hours


@dataclass(frozen=True)
class Plan:
    """A schedule, and what it runs on."""

    model: DetrConfig
    """The architecture, with the number of classes of the data."""
    train: TrainSection
    data: PlannedData
    card: Card | None
    """None where a profile was measured on something else."""
    utilisation: float
    """Part of the card's most that is reached; a profile takes its place."""
    profile: Profile | None = None
    bandwidth: float | None = None
    """Bytes a second that a GPU sends to the next; None for the card's link within a machine and `NETWORK` beyond."""
    price: float | None = None
    """Of an hour of a GPU."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the schedule."""
        return self.train.total_steps(self.data.images)

    @cached_property
    def canvases(self) -> tuple[tuple[int, int], tuple[int, int], float]:
        """Height and width of the canvas nearest to the mean and of the greatest, and the mean area in pixels."""
        drawn = draw_canvases(self.data.sizes, self.train)
        areas = drawn.prod(axis=1)
        mean, greatest = drawn[np.abs(areas - areas.mean()).argmin()].tolist(), drawn[areas.argmax()].tolist()
        return (mean[0], mean[1]), (greatest[0], greatest[1]), float(areas.mean())

    @cached_property
    def work(self) -> Work:
        """What a mean micro-batch takes in training."""
        (height, width), _, area = self.canvases
        return micro_batch(self.model, self.train, (height, width)).work().times(area / (height * width))

    @cached_property
    def layout(self) -> Layout:
        """The tensors of the network."""
        return layout_of(skeleton(self.model, self.train.freeze_backbone), self.train)

    @cached_property
    def activations(self) -> tuple[int, int]:
        """Bytes of the greatest micro-batch: kept for the backward pass, and at a time at most."""
        return micro_batch(self.model, self.train, self.canvases[1]).memory()

    @property
    def checkpoints(self) -> Checkpoints:
        """What is written as the run goes on; as `Run.saves_after` has it."""
        epochs = np.arange(self.steps + 1) * self.train.global_batch / self.data.images
        crossed = np.diff(np.floor(epochs / self.train.checkpoint_epochs)) > 0
        written = int(crossed.sum()) + int(not crossed[-1])
        keep = self.train.keep_checkpoints
        kept = written if keep is None else min(written, keep + 1)
        return Checkpoints(self.layout.checkpoint(self.train.ema is not None), written, kept)

    def problem(self, gpus: int) -> str | None:
        """Why so many GPUs cannot share a step, and from which batch on they could; None where they can."""
        train = self.train
        if train.micro_batches % gpus == 0:
            return None
        shared = train.micro_batch * gpus
        batch = -(-train.global_batch // shared) * shared
        return (
            f"{train.micro_batches} micro-batches of {train.micro_batch} do not divide by {gpus}: "
            f"--set train.global_batch={batch} would, and is another recipe"
        )

    def row(self, nodes: int, gpus_of_node: int) -> Row:
        """The schedule on so many machines of so many GPUs, which have to be able to share a step."""
        gpus = nodes * gpus_of_node
        micro_batches = self.train.micro_batches // gpus
        one, update = self._seconds(gpus)
        waits = self._exchange.seconds(gpus, micro_batches, one, self.link(nodes))
        compute = micro_batches * one + update
        hours = self.steps * (compute + waits) / 3600
        return Row(
            gpus=gpus,
            nodes=nodes,
            micro_batches=micro_batches,
            compute=compute,
            communication=waits,
            hours=hours,
            cost=None if self.price is None else self.price * gpus * hours,
            node_bytes=self.data.bytes if self.data.whole_shards else self.data.bytes / nodes,
            memory=tuple(self._memory(stage, gpus) for stage in STAGES),
        )

    def link(self, nodes: int) -> Link:
        """The slowest way between two GPUs that follow each other."""
        within = NETWORK if self.card is None else self.card.link
        return Link(self.bandwidth or (within if nodes == 1 else NETWORK), LATENCY)

    @property
    def _exchange(self) -> Exchange:
        return Exchange(self.layout, self.train.zero_stage, self._zero)

    @property
    def _zero(self) -> dict[str, Any]:
        zero: dict[str, Any] = engine_config(self.train, 1)["zero_optimization"]
        return zero

    def _seconds(self, gpus: int) -> tuple[float, float]:
        """Seconds of a micro-batch and of the optimizer's step."""
        part = gpus if self.train.zero_stage else 1
        if self.profile is not None:
            return self.profile.seconds(self.work.flops), self.profile.optimizer / part
        assert self.card is not None, "without a profile there is a card"
        update = ADAMW_PASSES * FLOAT * self.layout.trained / self.card.memory_bandwidth
        return self.card.seconds(self.work, self.train.precision, self.utilisation), update / part

    def _memory(self, stage: int, gpus: int) -> Memory:
        kept, peak = self.activations
        zero = self._zero
        bucket = int(zero["reduce_bucket_size"]) * (2 if zero.get("overlap_comm") else 1)
        own = {"average": self.train.ema is not None, "offload": self.train.offload == "cpu"}
        return memory_of_rank(self.layout, stage, gpus, activations=kept, peak=peak, bucket=bucket, **own)


def profile_canvases(plan: Plan) -> Sequence[tuple[int, int]]:
    """Sizes to measure a profile with: of the mean canvas, of one with half its sides, and of the greatest."""
    mean, greatest, _ = plan.canvases
    half = (max(32, mean[0] // 64 * 32), max(32, mean[1] // 64 * 32))
    return list(dict.fromkeys([half, mean, greatest]))
