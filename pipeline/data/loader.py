"""Micro-batches for training and batches for evaluation, decoded in parallel worker processes.

A training step is a function of its global batch: the batch is cut into micro-batches of like augmented shapes, and
micro-batch j goes to rank j mod world. So the same step holds the same micro-batches at any number
of ranks. One item of the data loader is one micro-batch, known by (step, j) alone.
"""

import multiprocessing
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model.batch import PixelBatch
from pipeline.config.sections import EvaluateSection, OnError, TrainSection
from pipeline.data.augment import plan_eval
from pipeline.data.batching import CANVAS_MULTIPLE
from pipeline.data.images import Pixels
from pipeline.data.manifest import Manifest, UnreadableSampleError
from pipeline.data.order import SampleOrder
from pipeline.data.samples import StepPlan, load_image, load_train_sample, make_targets, plan_steps
from pipeline.data.truth import original_size
from pipeline.errors import UserError
from pipeline.log import get_logger

PLACEHOLDER_SIDE = 64
"""Side in pixels of the black image that stands for a micro-batch of which no sample could be read."""

PREFETCH = 2
"""Items that each worker process works ahead."""

PLANNED = 512
"""Samples that are planned at once, unless a step has more."""

SHARED_MEMORY = "/dev/shm"
"""Where worker processes put their items. A write beyond its end hangs or kills them, so it is measured before."""

logger = get_logger(__name__)


@dataclass(frozen=True)
class MicroBatch:
    """The images that go through the network at once.

    `targets` holds one {"labels": int64 [n], "boxes": float32 [n, 4] cxcywh in 0..1} an image, on the host. `index` is
    j, the number of the micro-batch in its step. `image_ids` are those of `batch`, empty when it is the placeholder.
    """

    batch: PixelBatch
    targets: list[dict[str, Tensor]]
    index: int
    image_ids: list[int]
    skipped: int = 0

    def pin_memory(self) -> "MicroBatch":
        """The same in page-locked memory (`DataLoader` calls this where there is a GPU)."""
        targets = [{name: value.pin_memory() for name, value in target.items()} for target in self.targets]
        return replace(self, batch=self.batch.pin_memory(), targets=targets)


@dataclass(frozen=True)
class Step:
    """One rank's share of a step."""

    step: int
    epoch: int
    micro_batches: list[MicroBatch]


class EvalBatch(NamedTuple):
    """Images of the evaluation, their ids and their original sizes: int64 [batch, 2] (height, width)."""

    batch: PixelBatch
    image_ids: list[int]
    sizes: Tensor


@dataclass(frozen=True)
class _Failure:
    """An error of the user's input on its way out of a worker process, which would wrap an exception in tracebacks."""

    message: str


class TrainLoader:
    """One rank's micro-batches of the steps start_step..stop_step-1; every rank has the same number of them.

    Args:
        manifest: the training split.
        order: the stream of its samples.
        train: for the batch sizes, the seed, the augmentation and the worker processes.
        rank: of this process.
        world: number of ranks; divides the micro-batches of a step.
        start_step: first step, at no cost whatever it is.
        stop_step: one past the last step.
        on_error: whether a sample that cannot be read stops the run or is left out and counted.

    Iterating raises `UserError` for an unreadable sample when on_error is "fail", and where the worker processes may
    need more shared memory than is free.
    """

    def __init__(
        self,
        manifest: Manifest,
        order: SampleOrder,
        train: TrainSection,
        rank: int,
        world: int,
        start_step: int,
        stop_step: int,
        on_error: OnError = "fail",
    ) -> None:
        assert 0 <= rank < world
        assert train.micro_batches % world == 0
        self._steps = range(start_step, stop_step)
        self._own = train.micro_batches // world
        self._order = order
        self._manifest = manifest
        self._train = train
        self._dataset = _TrainDataset(manifest, order, train, rank, world, self._steps, on_error)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Step]:
        train = self._train
        pixels = train.micro_batch * train.augment.greatest_side**2
        _refuse_small_memory(train.loader_workers, pixels, "train.loader_workers")
        batch, ahead = self._train.global_batch, self._manifest.fetch_ahead()
        wanted: list[int] = []
        items = iter(_data_loader(self._dataset, self._train.loader_workers))
        try:
            for step in self._steps:
                if ahead is not None and (shards := self._order.shards_ahead(step, batch)) != wanted:
                    wanted = shards
                    ahead.want(wanted)
                own = list(islice(items, self._own))
                yield Step(step, self._order.epoch_of(step, batch), [_raised(item) for item in own])
        finally:
            if ahead is not None:
                ahead.close()
            del items  # ends the workers now: an error's traceback would keep them until it is collected


def prepare_workers(workers: int) -> None:
    """Have what worker processes are forked from import torch while the caller goes on, which takes seconds.

    Args:
        workers: of the loader that is made later.
    """
    if workers:
        _forkserver()
        forkserver.ensure_running()


def eval_batches(manifest: Manifest, batch_size: int, of: Sequence[int] | None = None) -> list[list[int]]:
    """The sample indices of each evaluation batch: every sample, or of some, once; images of like shape together."""
    chosen = np.arange(len(manifest.samples)) if of is None else np.asarray(of)
    rows = manifest.samples.rows[chosen]
    indices = chosen[np.argsort(rows["width"] / rows["height"], kind="stable")].tolist()
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


class EvalLoader:
    """Evaluation batches in the given order.

    Args:
        manifest: the split.
        batches: sample indices of each batch, from `eval_batches`.
        evaluate: for the sizes.
        workers: decoding processes; 0 decodes here.
        on_error: whether an image that cannot be read raises `UserError` or is left out with a warning.

    Iterating raises `UserError` where the worker processes may need more shared memory than is free, too.
    """

    def __init__(
        self,
        manifest: Manifest,
        batches: list[list[int]],
        evaluate: EvaluateSection,
        workers: int = 0,
        on_error: OnError = "fail",
    ) -> None:
        self._dataset = _EvalDataset(manifest, batches, evaluate.short_side, evaluate.max_side, on_error)
        self._workers = workers
        self._pixels = max((len(batch) for batch in batches), default=0) * evaluate.max_side**2

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[EvalBatch]:
        _refuse_small_memory(self._workers, self._pixels, "evaluate.loader_workers")
        items = iter(_data_loader(self._dataset, self._workers))
        try:
            for item in items:
                batch, unreadable = _raised(item)
                for message in unreadable:
                    logger.warning("left out: %s", message)
                if batch is not None:
                    yield batch
        finally:
            del items


class _TrainDataset(Dataset[Any]):
    """Item i is the i-th of this rank's micro-batches, counted from the first step."""

    def __init__(
        self,
        manifest: Manifest,
        order: SampleOrder,
        train: TrainSection,
        rank: int,
        world: int,
        steps: range,
        on_error: OnError,
    ) -> None:
        self._manifest = manifest
        self._order = order
        self._train = train
        self._rank = rank
        self._world = world
        self._steps = steps
        self._on_error = on_error
        self._own = train.micro_batches // world
        self._planned: dict[int, StepPlan] = {}

    def __len__(self) -> int:
        return len(self._steps) * self._own

    def __getitem__(self, item: int) -> MicroBatch | _Failure:
        try:
            return self._micro_batch(item)
        except UserError as error:  # of a shard's store
            return _Failure(str(error))

    def _micro_batch(self, item: int) -> MicroBatch | _Failure:
        step = self._steps[item // self._own]
        index = self._rank + item % self._own * self._world
        part = self._plan(step).part(index, self._train.micro_batch)
        batch, places = PixelBatch.of_sizes([plan.size for _, plan in part], CANVAS_MULTIPLE)
        images: list[Pixels] = []
        targets: list[dict[str, Tensor]] = []
        image_ids: list[int] = []
        skipped = 0
        for (number, plan), place in zip(part, places, strict=True):
            sample = self._manifest.samples[number]
            try:
                image, target = load_train_sample(self._manifest, sample, plan, place)
            except UnreadableSampleError as error:
                if self._on_error == "fail":
                    return _Failure(_unreadable(error))
                skipped += 1
                continue
            images.append(image)
            targets.append(target)
            image_ids.append(sample.image_id)
        if not images:
            images.append(np.zeros((PLACEHOLDER_SIDE, PLACEHOLDER_SIDE, 3), dtype=np.uint8))
            targets.append(make_targets(np.zeros((0, 4)), [], (PLACEHOLDER_SIDE, PLACEHOLDER_SIDE)))
        if skipped:
            batch = PixelBatch.collate(images, CANVAS_MULTIPLE)
        return MicroBatch(batch, targets, index, image_ids, skipped)

    def _plan(self, step: int) -> StepPlan:
        if step not in self._planned:
            steps = range(step, min(step + max(PLANNED // self._train.global_batch, 1), self._steps.stop))
            plans = plan_steps(self._manifest, self._order, step, len(steps), self._train)
            self._planned = dict(zip(steps, plans, strict=True))
        return self._planned[step]


class _EvalDataset(Dataset[Any]):
    def __init__(
        self, manifest: Manifest, batches: list[list[int]], short_side: int, max_side: int, on_error: OnError
    ) -> None:
        self._manifest = manifest
        self._batches = batches
        self._short_side = short_side
        self._max_side = max_side
        self._on_error = on_error

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, item: int) -> tuple[EvalBatch | None, list[str]] | _Failure:
        try:
            return self._batch(item)
        except UserError as error:  # of a shard's store
            return _Failure(str(error))

    def _batch(self, item: int) -> tuple[EvalBatch | None, list[str]] | _Failure:
        images: list[Pixels] = []
        image_ids: list[int] = []
        sizes: list[tuple[int, int]] = []
        unreadable: list[str] = []
        for index in self._batches[item]:
            sample = self._manifest.samples[index]
            plan = plan_eval(sample.width, sample.height, self._short_side, self._max_side)
            try:
                width, height = original_size(self._manifest, sample)
                images.append(plan.apply_image(load_image(self._manifest, sample)))
            except UnreadableSampleError as error:
                if self._on_error == "fail":
                    return _Failure(_unreadable(error))
                unreadable.append(str(error))
                continue
            image_ids.append(sample.image_id)
            sizes.append((height, width))
        if not images:
            return None, unreadable
        return EvalBatch(PixelBatch.collate(images), image_ids, torch.tensor(sizes, dtype=torch.int64)), unreadable


def _unreadable(error: UnreadableSampleError) -> str:
    return f"{error}. Mend the shards (`raydetr shard --verify` checks them), or set dataset.on_error: skip."


def _raised(item: Any) -> Any:
    if isinstance(item, _Failure):
        raise UserError(item.message)
    return item


def _as_it_is(item: Any) -> Any:
    return item


def _refuse_small_memory(workers: int, pixels: int, setting: str) -> None:
    """Raise a UserError where the worker processes of this host's ranks may share more than there is room for.

    Args:
        workers: of each rank.
        pixels: of the most that an item can have.
        setting: of the workers, for the message.
    """
    if workers == 0 or not os.path.isdir(SHARED_MEMORY):
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    need = ranks * workers * (PREFETCH + 1) * pixels * 4  # three colours and the mask
    free = shutil.disk_usage(SHARED_MEMORY).free
    if need > free:
        raise UserError(
            f"{SHARED_MEMORY} on {socket.gethostname()} has {free / 2**20:.0f} MiB free, and {ranks} workers with "
            f"{setting} {workers} may share {need / 2**20:.0f} MiB: make it larger (`--shm-size` of a container, an "
            f"emptyDir of medium Memory in Kubernetes), or set {setting}: 0"
        )


def _start_worker(_: int) -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def _data_loader(dataset: Dataset[Any], workers: int) -> DataLoader[Any]:
    # Its own generator: the data loader would otherwise draw from the global one, which belongs to the training.
    generator = torch.Generator()
    if workers == 0:
        return DataLoader(dataset, batch_size=None, collate_fn=_as_it_is, generator=generator)
    return DataLoader(
        dataset,
        batch_size=None,
        collate_fn=_as_it_is,
        generator=generator,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=PREFETCH,
        worker_init_fn=_start_worker,
        multiprocessing_context=_forkserver(),
    )


def _forkserver() -> BaseContext:
    """The way to start workers.

    Forking a process that holds threads (gloo, Ray, CUDA) is unsafe; the fork server holds none, and importing this
    module in it once spares every worker its own import of torch.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context
