"""A training run: what it is, and where it goes on.

A run goes on from its newest checkpoint with the settings that it began with; those that do not change what a step does
may differ.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.config import DetrConfig
from pipeline.checkpoint.find import newest_whole
from pipeline.checkpoint.optimizer import group_settings
from pipeline.checkpoint.save import clean
from pipeline.checkpoint.state import STATE, Scaling, State, checkpoints
from pipeline.config.sections import Metric, OnError, Role, TrainSection, settings_with
from pipeline.config.values import differences, plain
from pipeline.data.cache import DEFAULT_CACHE, Cache
from pipeline.data.manifest import Manifest
from pipeline.distributed import World, on_rank_zero, together
from pipeline.errors import UserError
from pipeline.files import make_folder
from pipeline.mirror import Mirror
from pipeline.run_folder import RunFolder
from pipeline.store import Place
from pipeline.train.optim import lr_factor
from pipeline.train.scores import best_of, scored

MAY_DIFFER = {f"train.{name}" for name in settings_with(TrainSection, Role.MAY_DIFFER)}
"""Settings that a run may go on with when they changed: none of them changes what a step does."""


@dataclass(frozen=True)
class TrainJob:
    """What is trained, on what, and where it is kept."""

    model: DetrConfig
    """Architecture, with the number of classes of the data."""
    train: TrainSection
    """Schedule, batches, optimizer."""
    shards: Place
    """Folder of the training split's shards."""
    out: RunFolder
    """Where checkpoints and curves are kept."""
    on_error: OnError = "fail"
    """Whether a sample that cannot be read stops the run, or is left out and counted."""
    cache: Cache = DEFAULT_CACHE
    """Where the shards of a store are kept on each machine."""
    metric: Metric = "AP"
    """By which the best of the checkpoints that were scored beside training is kept, too."""
    subset: int = 0
    """Images of the validation split that those scores are of; 0 for all."""
    ends: float | None = None
    """Unix time at which it ends in order, with a checkpoint, done or not."""
    timeout: float = 60
    """Seconds without a sign of life after which a rank is lost."""
    step_timeout: float = 1200
    """Seconds in which no rank ends a step, after which training hangs."""
    root: Path = Path()
    """Folder that relative paths in `train.init` begin in: where the command was given, whichever host reads them."""

    parent: Path | None = None
    """The weights' file of the registered version, where `train.init.weights` names one."""

    @property
    def config(self) -> dict[str, Any]:
        """The settings that a checkpoint keeps."""
        return {"model": plain(self.model), "train": plain(self.train)}


@dataclass(frozen=True)
class Run:
    """A training run on its data: what follows from the job and the manifest."""

    job: TrainJob
    world: World
    manifest: Manifest

    @property
    def samples(self) -> int:
        """Images of an epoch."""
        return len(self.manifest.samples)

    @property
    def total(self) -> int:
        """Steps of the schedule."""
        return self.job.train.total_steps(self.samples)

    def epochs(self, steps: int) -> float:
        """Epochs that so many steps make."""
        return steps * self.job.train.global_batch / self.samples

    def factor(self, step: int) -> float:
        """Factor on the learning rates at a step."""
        train = self.job.train
        return lr_factor(
            step,
            samples=self.samples,
            global_batch=train.global_batch,
            drop_epochs=train.lr_drop_epochs,
            warmup_steps=train.warmup_steps,
        )

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint follows a step: with it another `checkpoint_epochs` are full, or training is done."""
        full = [self.job.train.periods(steps, self.samples) for steps in (step, step + 1)]
        return step + 1 == self.total or full[1] > full[0]

    def best_scored(self) -> str | None:
        """Name of the best of the checkpoints that are scored by now, and there; of equal ones the newest."""
        there = {path.name for path in checkpoints(self.job.out.checkpoints)}
        scores = scored(self.job.out, self.job.metric, self.job.subset)
        return best_of({name: value for name, value in scores.items() if name in there})

    def state(self, step: int, skipped: int, optimizer: torch.optim.Optimizer, scaling: Scaling | None = None) -> State:
        """What a checkpoint after `step` steps says."""
        train = self.job.train
        return State(
            step=step,
            epoch=math.floor(self.epochs(step)),
            samples=step * train.global_batch,
            skipped=skipped,
            seeds={"train": train.seed},
            world_size=self.world.size,
            zero_stage=train.zero_stage,
            config=self.job.config,
            labels=self.manifest.labels.to_json(),
            data_digest=self.manifest.digest,
            groups=group_settings(optimizer),
            scaling=scaling,
        )


def resume_point(
    job: TrainJob, manifest: Manifest, bring: Callable[[str], object] = lambda name: None
) -> tuple[Path, State] | None:
    """The newest whole checkpoint of a run and its state, or None where training begins.

    Damaged ones that are newer are set aside, so one process at a time may call this; `bring` as of `newest_whole`.

    Raises:
        UserError: the checkpoint is of another run: its settings or its data differ, or it is beyond the schedule; or
            this version does not know its settings.
    """
    found = newest_whole(job.out.checkpoints, bring)
    if found is not None:
        check_same_run(job, manifest, found[1], found[0])
    return found


def find_checkpoint(run: Run, mirror: Mirror) -> tuple[Path, State] | None:
    """`resume_point` as rank 0 sees it, for all; whole in the folder of each."""
    job, world = run.job, run.world
    if job.train.micro_batches % world.size:
        raise UserError(
            f"train.global_batch {job.train.global_batch} is {job.train.micro_batches} micro-batches of "
            f"{job.train.micro_batch}, which {world.size} workers cannot share equally: change one of the three"
        )
    assert job.model.num_classes == run.manifest.labels.num_classes, "num_classes follows from the label map"

    def find() -> tuple[Path, State] | None:
        make_folder(job.out.checkpoints)
        clean(job.out.checkpoints)
        return resume_point(job, run.manifest, mirror.get_checkpoint)

    found = on_rank_zero(world, find)
    if found is None:
        return None
    return together(world, lambda: mirror.get_checkpoint(found[0].name)), found[1]


def check_same_run(job: TrainJob, manifest: Manifest, state: State, path: Path) -> None:
    file = path / STATE
    trained = {"model": plain(state.detr_config(file)), "train": plain(state.train_section(file))}
    lines = differences(trained, job.config)
    changed = [line for line in lines if line.split(":", 1)[0] not in MAY_DIFFER]
    if state.data_digest != manifest.digest:
        changed.append(f"digest of {manifest.folder}: {state.data_digest} -> {manifest.digest}")
    if changed:
        raise UserError(
            f"{path} was trained with other settings ({'; '.join(changed)}): "
            f"use another name, or delete {job.out} to begin anew"
        )
    total = job.train.total_steps(len(manifest.samples))
    if state.step > total:
        raise UserError(
            f"{path} is beyond the end of the schedule, step {total}: raise train.epochs or train.max_steps, "
            "or use another name"
        )
