"""Training: a loop over the steps of the schedule, under DeepSpeed, resumable at any step.

    python -m pipeline.train -c config.yaml
    torchrun --nproc-per-node 2 -m pipeline.train -c config.yaml --set train.zero_stage=1

run it without Ray (the shards must be there); `jobs/train.py` runs the same function in Ray Train's workers. A step is
a function of its global batch: the losses are divided by the number of boxes of all ranks, DeepSpeed's averages are
turned back into sums, and everything random is seeded by (seed, step, micro-batch), so the numbers do not depend on the
number of ranks.
"""

import argparse
import hashlib
import logging
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from model.build import build_model
from model.config import DetrConfig
from model.losses.criterion import Criterion
from model.losses.groups import groups_of
from model.recompute import recompute_activations
from model.weights.files import load_backbone, load_weights
from pipeline import checkpoint
from pipeline.checkpoint.save import State
from pipeline.config.sections import InitSection, TrainSection, differences, load_config, plain, with_keys
from pipeline.data.loader import Step, TrainLoader
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.data.order import SampleOrder
from pipeline.distributed import (
    World,
    all_reduce_sum,
    broadcast_object,
    close,
    gather_objects,
    init_world,
    on_rank_zero,
    raise_together,
    sum_over_ranks,
    together,
)
from pipeline.errors import UserError
from pipeline.log import get_logger, set_up_logging
from pipeline.train.curves import Curves
from pipeline.train.optim import lr_factor, make_optimizer, parameter_groups, set_learning_rates

logger = get_logger(__name__)

MAY_DIFFER = {
    f"train.{key}"
    for key in (
        "epochs",
        "max_steps",
        "zero_stage",
        "activation_checkpointing",
        "loader_workers",
        "log_steps",
        "checkpoint_epochs",
        "keep_checkpoints",
        "max_restarts",
    )
}
"""Settings that a run may go on with when they changed: none of them changes what a step does."""


@dataclass(frozen=True)
class TrainJob:
    """What is trained, on what, and where it is kept."""

    model: DetrConfig
    """Architecture, with the number of classes of the data."""
    train: TrainSection
    """Schedule, batches, optimizer."""
    shards: Path
    """Folder of the training split's shards."""
    out: Path
    """Folder of the run: `checkpoints/` and `spool/train.jsonl` are made below it."""
    on_error: Literal["fail", "skip"] = "fail"
    """Whether a sample that cannot be read stops the run, or is left out and counted."""
    root: Path = Path()
    """Folder that relative paths in `train.init` begin in: where the command was given, whichever host reads them."""

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.out / "checkpoints"

    @property
    def spool(self) -> Path:
        """File of the training curves."""
        return self.out / "spool" / "train.jsonl"


@dataclass(frozen=True)
class _Run:
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
        period = self.job.train.checkpoint_epochs
        full = [math.floor(self.epochs(steps) / period) for steps in (step, step + 1)]
        return step + 1 == self.total or full[1] > full[0]


def train(job: TrainJob, world: World) -> Path:
    """Train to the end of the schedule, from the newest checkpoint of the run where there is one.

    Every rank of `world` calls it with the same job.

    Returns:
        The checkpoint of the last step.

    Raises:
        UserError: the input is wrong, the run is another one, the disk is full, or a loss is not finite; raised on
            every rank, and the checkpoint before it is whole.
    """
    run = _Run(job, world, together(world, lambda: read_manifest(job.shards)))
    found = _find_checkpoint(run)
    if found is not None and found[1].step == run.total:
        logger.info("%s: training is done already", found[0])
        return found[0]
    path, first, skipped = (found[0], found[1].step, found[1].skipped) if found else (None, 0, 0)
    engine = _make_engine(run, found)
    criterion = Criterion(job.train.criterion, job.model.class_loss)
    spool = job.spool if world.rank == 0 else None
    curves = Curves(spool, job.train, run.total, run.epochs, first)
    try:
        for step, num_boxes, unreadable in _global_steps(run, first):
            set_learning_rates(engine.basic_optimizer, run.factor(step.step))
            losses = _forward_backward(engine, criterion, step, num_boxes, run)
            values = _agree_on_finite(losses, _gradient_norm(engine), step, run)
            engine.step()
            skipped += unreadable
            curves.step_done(step.step, {**values, "skipped": skipped}, engine.basic_optimizer)
            if run.saves_after(step.step):
                state = _state(run, step.step + 1, skipped, engine.basic_optimizer)
                path = checkpoint.save(engine, world, job.checkpoints, state, job.train.keep_checkpoints)
                logger.info("%s written", path)
    finally:
        curves.close()
        engine.destroy()
    assert path is not None, "the last step writes a checkpoint"
    return path


def _global_steps(run: _Run, first: int) -> Iterator[tuple[Step, float, int]]:
    """This rank's part of every step from `first`, the boxes and the unreadable samples of the whole step.

    What stops the loader of one rank stops all ranks, before any of them waits for the other's gradients.
    """
    job, world, manifest = run.job, run.world, run.manifest
    order = SampleOrder(manifest.digest, manifest.shard_sizes, job.train.seed, job.train.window)
    steps = iter(TrainLoader(manifest, order, job.train, world.rank, world.size, first, run.total, job.on_error))
    for _ in range(first, run.total):
        error: Exception | None = None
        boxes = skipped = 0
        try:
            step = next(steps)
            boxes = sum(len(target["labels"]) for micro in step.micro_batches for target in micro.targets)
            skipped = sum(micro.skipped for micro in step.micro_batches)
        except Exception as caught:
            error = caught
        boxes_of_all, skipped_of_all, failed = sum_over_ranks(world, boxes, skipped, error is not None)
        if failed:
            raise_together(world, error)
        yield step, boxes_of_all, int(skipped_of_all)


def dropout_seed(seed: int, step: int, index: int) -> int:
    """Seed of what is random in the forward pass of micro-batch `index` of a step, at any number of ranks."""
    return int(np.random.SeedSequence([seed, step, index]).generate_state(1, np.uint64)[0] >> 1)


def _forward_backward(
    engine: Any, criterion: Criterion, step: Step, num_boxes: float, run: _Run
) -> dict[str, torch.Tensor]:
    """Accumulate and reduce a step's gradients; this rank's share of the losses, `loss` being their weighted sum."""
    train, device = run.job.train, run.world.device
    sums: dict[str, torch.Tensor] = {}
    for number, micro in enumerate(step.micro_batches):
        torch.manual_seed(dropout_seed(train.seed, step.step, micro.index))
        engine.set_gradient_accumulation_boundary(number == len(step.micro_batches) - 1)
        outputs = engine(micro.batch.to(device))
        targets = [
            {key: value.to(device, non_blocking=True) for key, value in target.items()} for target in micro.targets
        ]
        losses = criterion(groups_of(outputs, targets), num_boxes, train.global_batch)
        if not micro.image_ids:  # a placeholder for images that cannot be read
            losses = losses.scaled(0.0)
        total = losses.total()
        # DeepSpeed divides by the micro-batches of a rank and by the ranks.
        engine.backward(total * train.micro_batches)
        for name, loss in {"loss": total, **losses.values}.items():
            sums[name] = sums.get(name, 0.0) + loss.detach().double()
    return sums


def _gradient_norm(engine: Any) -> torch.Tensor:
    """Norm of the whole step's gradient before clipping, the same on every rank."""
    if engine.zero_optimization_stage() == 0:
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)
    norm = engine.optimizer.scaled_global_norm().detach()
    return torch.where(norm < 0, torch.inf, norm)  # -1 stands for "not finite"


def _agree_on_finite(losses: dict[str, torch.Tensor], norm: torch.Tensor, step: Step, run: _Run) -> dict[str, float]:
    """The losses of the global batch and the gradient's norm, or the same error on every rank before weights change."""
    world, names = run.world, list(losses)
    own = torch.stack(list(losses.values()))
    sums = all_reduce_sum(world, own.clone())
    values = dict(zip([*names, "grad_norm"], torch.cat([sums, norm.double().view(1)]).tolist(), strict=True))
    if all(math.isfinite(value) for value in values.values()):
        return values
    ids = [] if torch.isfinite(own).all() else [image for micro in step.micro_batches for image in micro.image_ids]
    images = sorted(image for part in gather_objects(world, ids) for image in part)
    bad = ", ".join(f"{name} {value}" for name, value in values.items() if not math.isfinite(value))
    before = broadcast_object(world, checkpoint.latest(run.job.checkpoints))
    raise UserError(
        f"step {step.step}: not finite: {bad}"
        + (f"; it comes from the micro-batches of images {images}" if images else "")
        + "; lower train.lr or train.clip_grad_norm, or use train.precision: fp32"
        + (f"; {before} is whole" if before else "; no checkpoint was written yet")
    )


def resume_point(job: TrainJob, manifest: Manifest) -> tuple[Path, State] | None:
    """The newest checkpoint of a run and its state, or None where training begins; only reads.

    Raises:
        UserError: the checkpoint is of another run: its settings or its data differ, or it is beyond the schedule.
    """
    path = checkpoint.latest(job.checkpoints)
    if path is None:
        return None
    state = checkpoint.read_state(path)
    _check_same_run(job, manifest, state, path)
    return path, state


def _find_checkpoint(run: _Run) -> tuple[Path, State] | None:
    """`resume_point` as rank 0 sees it, for all."""
    job, world = run.job, run.world
    if job.train.micro_batches % world.size:
        raise UserError(
            f"train.global_batch {job.train.global_batch} is {job.train.micro_batches} micro-batches of "
            f"{job.train.micro_batch}, which {world.size} workers cannot share equally: change one of the three"
        )
    assert job.model.num_classes == run.manifest.labels.num_classes, "num_classes follows from the label map"

    def find() -> tuple[Path, State] | None:
        job.checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoint.clean(job.checkpoints)
        return resume_point(job, run.manifest)

    return on_rank_zero(world, find)


def _config(job: TrainJob) -> dict[str, Any]:
    return {"model": plain(job.model), "train": plain(job.train)}


def _check_same_run(job: TrainJob, manifest: Manifest, state: State, path: Path) -> None:
    # A setting that is newer than the checkpoint had the effect of its default.
    defaults = {"model": plain(DetrConfig()), "train": plain(TrainSection())}
    trained = {section: defaults[section] | values for section, values in state.config.items()}
    lines = differences(trained, _config(job))
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


def _make_model(job: TrainJob, found: tuple[Path, State] | None, world: World) -> nn.Module:
    """The model with the weights that training goes on from or begins with, the same on every rank."""
    torch.manual_seed(job.train.seed)
    model = build_model(job.model)
    if found is not None:
        weights = together(world, lambda: checkpoint.load_model_weights(found[0]))
        model.load_state_dict(weights)
    elif job.train.init.backbone is not None or job.train.init.weights is not None:
        on_rank_zero(world, lambda: _load_initial_weights(model, job.train.init, job.root))
        for tensor in model.state_dict().values():
            if world.size > 1:
                torch.distributed.broadcast(tensor, src=0, group=world.host_group)
    digests = gather_objects(world, _digest(model))
    assert len(set(digests)) == 1, f"the ranks begin with different weights: {digests}"
    model.backbone.freeze(job.train.freeze_backbone)
    recompute_activations(model, job.train.activation_checkpointing)
    if job.train.compile:
        model.transformer.compile(dynamic=True)  # one graph; after too many odd sizes torch goes on without
    return model.train()


def is_path(source: str) -> bool:
    """Whether a value of `train.init` names a file or folder, not a download."""
    return source != "imagenet" and "://" not in source


def _load_initial_weights(model: nn.Module, init: InitSection, root: Path) -> None:
    try:
        if init.backbone is not None:
            report = load_backbone(model, root / init.backbone if is_path(init.backbone) else init.backbone)
            logger.info("train.init.backbone: %s", report)
        if init.weights is not None:
            report = load_weights(model, root / init.weights, reset_heads=init.reset_heads)
            logger.info("train.init.weights: %s", with_keys(str(report), "model"))
            if init.reset_heads and not report.reset:
                logger.warning("train.init.reset_heads: the class heads are kept, since they fit the number of classes")
    except ValueError as error:
        raise UserError(f"train.init: {with_keys(str(error), 'model', 'train.init')}") from error


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def engine_config(train: TrainSection, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Parameters and gradients are fp32 at every precision; bf16 is torch's autocast."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.micro_batches // world_size,
        "gradient_clipping": train.clip_grad_norm,
        # Buckets of 200 MB in place of 2 GB: the whole model fits into one.
        "zero_optimization": {"stage": train.zero_stage, "reduce_bucket_size": 50_000_000, "overlap_comm": False},
        "steps_per_print": 2**31,
    }
    if train.precision == "bf16":
        # Parameters of "safe" modules would have their gradients reduced in bf16: none are.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config


def _make_engine(run: _Run, found: tuple[Path, State] | None) -> Any:
    job, world = run.job, run.world
    deepspeed = _import_deepspeed(world)
    model = _make_model(job, found, world).to(world.device)
    optimizer = make_optimizer(parameter_groups(model, job.train))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=engine_config(job.train, world.size), dist_init_required=False
    )
    if found is not None:
        path, state = found
        set_learning_rates(engine.basic_optimizer, run.factor(state.step - 1))
        together(world, lambda: checkpoint.restore_optimizer(engine, world, path, state))
        logger.info("going on from %s", path)
    return engine


def _import_deepspeed(world: World) -> Any:
    """Import DeepSpeed where it is needed only: it takes seconds, and picks its device from the environment."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # An all-reduce of its own for CPU inference, which would be compiled now and which training does not use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _state(run: _Run, step: int, skipped: int, optimizer: torch.optim.Optimizer) -> State:
    return State(
        step=step,
        epoch=math.floor(run.epochs(step)),
        samples=step * run.job.train.global_batch,
        skipped=skipped,
        seeds={"train": run.job.train.seed},
        world_size=run.world.size,
        zero_stage=run.job.train.zero_stage,
        config=_config(run.job),
        labels=run.manifest.labels.to_json(),
        data_digest=run.manifest.digest,
        groups=checkpoint.group_settings(optimizer),
    )


def main(arguments: list[str] | None = None) -> int:
    """Train in this process, or in those that `torchrun` started. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.train", description=main.__doc__)
    parser.add_argument("-c", "--config", required=True, help="YAML file of the pipeline")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.set)
        world = init_world(config.cluster.device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    set_up_logging(world.rank)
    try:
        shards = config.shards_folder / "train"
        labels = together(world, lambda: read_manifest(shards)).labels
        model = config.model_for(labels.num_classes)
        train(TrainJob(model, config.train, shards, config.folder, config.dataset.on_error), world)
    except UserError as error:
        if world.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        close(world)
    return 0


if __name__ == "__main__":
    sys.exit(main())
