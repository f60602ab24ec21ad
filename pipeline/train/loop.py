"""Training: a loop over the steps of the schedule, resumable at any step.

A step is a function of its global batch: the losses are divided by the number of boxes of all ranks, DeepSpeed's
averages are turned back into sums, and everything random is seeded by (seed, step, micro-batch), so the numbers do not
depend on the number of ranks.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.batch import ImageBatch
from model.denoising import DRAWS, Noised, add_noise
from model.losses.criterion import Criterion
from model.losses.groups import groups_of
from pipeline.checkpoint.save import CheckpointWriter
from pipeline.checkpoint.state import latest
from pipeline.data.loader import MicroBatch, Step, TrainLoader, prepare_workers
from pipeline.data.manifest import read_manifest
from pipeline.data.order import SampleOrder
from pipeline.data.philox import philox
from pipeline.distributed import (
    World,
    begin_sum_over_ranks,
    broadcast_object,
    gather_objects,
    raise_together,
    together,
)
from pipeline.errors import UserError
from pipeline.log import get_logger, outcome
from pipeline.mirror import Mirror, worker_mirror
from pipeline.train.curves import Curves
from pipeline.train.ema import WeightAverage, make_average
from pipeline.train.engine import make_engine, take_step
from pipeline.train.flops import least_time
from pipeline.train.loss_scale import LossScale, loss_scale_of
from pipeline.train.optim import set_learning_rates
from pipeline.train.profile import StepProfile
from pipeline.train.run import Run, TrainJob, find_checkpoint
from pipeline.train.stop import StoppedError, StopRequest
from pipeline.train.watch import Watch

logger = get_logger(__name__)

NOISE = 1
"""What the seed of noised objects is told from others by."""


def train(job: TrainJob, world: World, stop: StopRequest | None = None) -> Path:
    """Train to the end of the schedule, from the newest checkpoint of the run where there is one.

    Args:
        job: the same on every rank.
        world: this process; every rank calls this.
        stop: tells when to end in order; when None, the file `RunFolder.stop` and `job.ends` do.

    Returns:
        The checkpoint of the last step.

    Raises:
        UserError: the input is wrong, the run is another one, the disk is full, or a loss is not finite; raised on
            every rank, and the checkpoint before it is whole.
        StoppedError: it was asked to end before the last step, and what was trained is kept.
    """
    with ExitStack() as stack:
        mirror = together(world, lambda: stack.enter_context(worker_mirror(job.out, world.rank)))
        copy = mirror.run
        watch = stack.enter_context(closing(Watch(world, copy, job.timeout, job.step_timeout, mirror.sync)))
        own = replace(job, out=copy)
        if job.parent and copy.store is not None:
            own = replace(own, parent=copy.parent / job.parent.name)
        path = _train(own, world, stop or StopRequest(copy.stop, job.ends), watch, mirror)
    return job.out.checkpoints / path.name


def _train(job: TrainJob, world: World, stop: StopRequest, watch: Watch, mirror: Mirror) -> Path:
    run = Run(job, world, together(world, lambda: read_manifest(job.shards, job.cache)))
    found = find_checkpoint(run, mirror)
    if found is not None and found[1].step == run.total:
        logger.info(outcome("train", job.out.place(found[0]), is_new=False))
        return found[0]
    path, first, skipped = (found[0], found[1].step, found[1].skipped) if found else (None, 0, 0)
    done = first
    prepare_workers(job.train.loader_workers)
    engine = make_engine(run, found)
    average = make_average(engine, run, found)
    criterion = Criterion(job.train.criterion, job.model.class_loss)
    copies = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None  # type: ignore[no-untyped-call]
    spool = job.out.train_spool if world.rank == 0 else None
    least = least_time(job.model, job.train, world.device) if world.rank == 0 else None
    curves = together(world, lambda: Curves(spool, job.train, run.total, run.epochs, first, least))
    keep = job.train.keep_checkpoints
    writer = CheckpointWriter(world, job.out.checkpoints, keep, run.best_scored, spool, mirror.send_patiently)
    asked = any(gather_objects(world, stop.asked()))
    traced = StepProfile(job.train.profile, job.out.profile, world.rank)
    try:
        for step, num_boxes, unreadable in _global_steps(run, first, watch, curves):
            if asked:
                break
            traced.before(step.step)
            set_learning_rates(engine.basic_optimizer, run.factor(step.step))
            parts = backward_each(engine, criterion, step, num_boxes, run, copies, watch.working)
            losses = summed(losses for _, losses in parts)
            error = curves.error or writer.error
            shared = _begin_to_share(losses, run, stop.asked(), error)
            writer.wait_copied()
            norm = take_step(engine, job.train.clip_grad_norm)
            values, asked = _agree(losses, shared, norm, step, run, error, writer, loss_scale_of(engine))
            if average is not None:
                average.update(step.step + 1)
            skipped += unreadable
            canvases = [tuple(micro.batch.mask.shape[1:]) for micro in step.micro_batches]
            curves.step_done(step.step, {**values, "skipped": skipped}, engine.basic_optimizer, canvases)
            watch.step_done()
            done = step.step + 1
            if run.saves_after(step.step):
                path = _begin_checkpoint(writer, engine, average, run, done, skipped)
        raise_together(world, curves.error)
        if first < done < run.total and not run.saves_after(done - 1):
            path = _begin_checkpoint(writer, engine, average, run, done, skipped)
        writer.finish()
        if done < run.total:
            raise StoppedError(job.out.place(path))
    finally:
        writer.close()
        curves.close()
        traced.close()
        engine.destroy()
    assert path is not None, "the last step writes a checkpoint"
    return path


def _begin_checkpoint(
    writer: CheckpointWriter, engine: Any, average: WeightAverage | None, run: Run, done: int, skipped: int
) -> Path:
    """Begin a checkpoint after `done` steps."""
    scale = loss_scale_of(engine)
    state = run.state(done, skipped, engine.basic_optimizer, scale.scaling if scale else None)
    return writer.begin(engine, state, average.weights if average else None)


def _global_steps(run: Run, first: int, watch: Watch, curves: Curves) -> Iterator[tuple[Step, float, int]]:
    """This rank's part of every step from `first`, the boxes and the unreadable samples of the whole step.

    The ranks sum these while they compute the step before, so that no forward pass waits for another rank. What stops
    the loader of one rank stops all ranks, before any of them waits for the other's gradients.
    """
    job, world, manifest = run.job, run.world, run.manifest
    order = SampleOrder(manifest.digest, manifest.shard_sizes, job.train.seed, job.train.window)
    steps = iter(TrainLoader(manifest, order, job.train, world.rank, world.size, first, run.total, job.on_error))

    def begin() -> tuple[Step | Exception, Callable[[], torch.Tensor]]:
        try:
            with watch.working(), curves.waiting():
                step = next(steps)
        except Exception as error:
            return error, begin_sum_over_ranks(world, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
        boxes = sum(len(target["labels"]) for micro in step.micro_batches for target in micro.targets)
        counts = [boxes, sum(micro.skipped for micro in step.micro_batches), 0]
        return step, begin_sum_over_ranks(world, torch.tensor(counts, dtype=torch.float64))

    following = begin() if first < run.total else None
    while following is not None:
        step, sums = following
        boxes, skipped, failed = sums().tolist()
        if failed:
            raise_together(world, step if isinstance(step, Exception) else None)
        assert isinstance(step, Step)
        following = begin() if step.step + 1 < run.total else None
        yield step, boxes, int(skipped)


def dropout_seed(seed: int, step: int, index: int) -> int:
    """Seed of what is random in the forward pass of micro-batch `index` of a step, at any number of ranks."""
    return int(np.random.SeedSequence([seed, step, index]).generate_state(1, np.uint64)[0] >> 1)


def noise_draws(seed: int, step: int, index: int, images: int, queries: int) -> NDArray[np.float64]:
    """The numbers [images, queries, DRAWS] in 0..1 of a micro-batch's noised objects, the same at any number of ranks
    and for an image whatever the others.
    """
    key, blocks = np.random.SeedSequence([seed, NOISE]).generate_state(2), queries * DRAWS // 4
    image, block = np.divmod(np.arange(images * blocks, dtype=np.uint64), np.uint64(blocks))
    counters = np.stack([block, image, np.full_like(block, index), np.full_like(block, step)], axis=1)
    return philox(counters, (int(key[0]), int(key[1]))).reshape(images, queries, DRAWS) / 2.0**32


def _noised(job: TrainJob, targets: list[dict[str, torch.Tensor]], step: int, index: int) -> Noised | None:
    """The queries of a micro-batch that begin as noised objects, where the model has some."""
    model = job.model
    if model.denoising is None:
        return None
    draws = noise_draws(job.train.seed, step, index, len(targets), model.denoising.queries)
    return add_noise(targets, model.denoising, model.num_classes, draws)


def backward_each(
    engine: Any,
    criterion: Criterion,
    step: Step,
    num_boxes: float,
    run: Run,
    copies: torch.cuda.Stream | None = None,
    working: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[tuple[MicroBatch, dict[str, torch.Tensor]]]:
    """Accumulate a step's gradients, and reduce them with the last; each micro-batch with its share of the losses.

    Args:
        engine: DeepSpeed's.
        criterion: of the model.
        step: this rank's part.
        num_boxes: of the global batch.
        run: the run.
        copies: a stream that brings each micro-batch to the device while the one before computes.
        working: what the work of this rank alone is done in.

    Yields:
        The losses in fp64 on the device, `loss` being their weighted sum.
    """
    train, device = run.job.train, run.world.device
    for number, (micro, batch, targets) in enumerate(_on_device(step.micro_batches, device, copies)):
        torch.manual_seed(dropout_seed(train.seed, step.step, micro.index))
        engine.set_gradient_accumulation_boundary(number == len(step.micro_batches) - 1)
        with working():
            noised = _noised(run.job, targets, step.step, micro.index)
            outputs = engine(batch) if noised is None else engine(batch, noised)
            groups = groups_of(outputs, targets, run.job.model.one_to_many, noised)
            losses = criterion(groups, num_boxes, train.global_batch)
        if not micro.image_ids:  # a placeholder for images that cannot be read
            losses = losses.scaled(0.0)
        total = losses.total()
        # DeepSpeed divides by the micro-batches of a rank and by the ranks.
        engine.backward(total * train.micro_batches)
        yield micro, {name: loss.detach().double() for name, loss in {"loss": total, **losses.values}.items()}


def summed(parts: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The sum of the losses of some micro-batches."""
    sums: dict[str, torch.Tensor] = {}
    for losses in parts:
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss
    return sums


def _on_device(
    micro_batches: list[MicroBatch], device: torch.device, copies: torch.cuda.Stream | None
) -> Iterator[tuple[MicroBatch, ImageBatch, list[dict[str, torch.Tensor]]]]:
    """Each micro-batch, its images and targets on the device: with a stream, copied while the one before computes."""

    def copied(micro: MicroBatch) -> tuple[MicroBatch, ImageBatch, list[dict[str, torch.Tensor]]]:
        with torch.cuda.stream(copies):  # does nothing with None
            targets = [{key: value.to(device, non_blocking=True) for key, value in t.items()} for t in micro.targets]
            return micro, micro.batch.to(device), targets

    if copies is None:
        yield from map(copied, micro_batches)
        return
    computes = torch.cuda.current_stream(device)
    ahead = copied(micro_batches[0])
    for following in [*micro_batches[1:], None]:
        micro, batch, targets = ahead
        computes.wait_stream(copies)
        for tensor in (batch.pixels, batch.mask, *(value for target in targets for value in target.values())):
            tensor.record_stream(computes)
        if following is not None:
            ahead = copied(following)
        yield micro, batch, targets


def _begin_to_share(
    losses: dict[str, torch.Tensor], run: Run, asked: bool, error: Exception | None
) -> Callable[[], torch.Tensor]:
    """Begin to sum the losses over all ranks, and to tell whether one was asked to end or has met an error."""
    own = torch.stack(list(losses.values()))
    return begin_sum_over_ranks(run.world, torch.cat([own, own.new_tensor([asked, error is not None])]))


def _agree(
    losses: dict[str, torch.Tensor],
    shared: Callable[[], torch.Tensor],
    norm: torch.Tensor,
    step: Step,
    run: Run,
    error: Exception | None,
    writer: CheckpointWriter,
    scale: LossScale | None = None,
) -> tuple[dict[str, float], bool]:
    """The losses of the global batch with the gradient's norm, and whether a rank was asked to end; alike on all ranks.

    Where one of the numbers is not finite, or a rank has met an error, every rank raises before a checkpoint is
    written; a gradient that a smaller loss scale may mend is no error, as its step was left out. These are the only
    numbers of a step that are read from the device, beside the costs of the matching.
    """
    world, names = run.world, list(losses)
    sums = shared()
    *numbers, any_asked, any_error, grad_norm = torch.cat([sums, norm.to(sums).view(1)]).tolist()
    if any_error:
        raise_together(world, error)
    values = dict(zip([*names, "grad_norm"], [*numbers, grad_norm], strict=True))
    if scale is not None and all(map(math.isfinite, numbers)) and (math.isfinite(grad_norm) or scale.mends(grad_norm)):
        values |= {"loss_scale": scale.scaling.factor, "overflows": scale.follow(step.step, grad_norm).overflows}
        return values, any_asked > 0
    if all(math.isfinite(value) for value in values.values()):
        return values, any_asked > 0
    is_mine = not torch.isfinite(torch.stack(list(losses.values()))).all()
    ids = [image for micro in step.micro_batches for image in micro.image_ids if is_mine]
    images = sorted(image for part in gather_objects(world, ids) for image in part)
    bad = ", ".join(f"{name} {value}" for name, value in values.items() if not math.isfinite(value))
    writer.finish()
    before = broadcast_object(world, latest(run.job.out.checkpoints))
    raise UserError(
        f"step {step.step}: not finite: {bad}"
        + (f"; it comes from the micro-batches of images {images}" if images else "")
        + "; lower train.lr or train.clip_grad_norm, or use train.precision: fp32"
        + f"; `raydetr replay {step.step}` shows where it begins"
        + (f"; {before} is whole" if before else "; no checkpoint was written yet")
    )
