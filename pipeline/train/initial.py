"""The model that training begins or goes on with: initial, given or saved weights, equal on every rank."""

import hashlib
from pathlib import Path

import torch
from torch import nn

from model.build import build_model
from model.config import DetrConfig
from model.recompute import recompute_activations
from model.weights.files import load_backbone, load_weights
from pipeline.checkpoint.state import MODEL, State, latest, load_model_weights, weights_in
from pipeline.config.keys import with_keys
from pipeline.config.sections import InitSection, TrainSection
from pipeline.distributed import World, gather_objects, on_rank_zero, together
from pipeline.errors import UserError
from pipeline.log import get_logger
from pipeline.train.run import TrainJob

logger = get_logger(__name__)

LEAST_STEPS = 1000
"""Optimizer steps that a schedule should have where the weights begin at random (`tests/benchmarks/small.py`)."""


def make_model(job: TrainJob, found: tuple[Path, State] | None, world: World) -> nn.Module:
    """The model with the weights that training goes on from or begins with, the same on every rank."""
    torch.manual_seed(job.train.seed)
    model = build_model(job.model)
    if found is not None:
        together(world, lambda: _load_checkpoint(model, found[0]))
    elif job.train.init.backbone is not None or job.train.init.weights is not None:
        on_rank_zero(world, lambda: _load_initial_weights(model, job.train.init, job.root, job.parent))
        for tensor in model.state_dict().values():
            if world.size > 1:
                torch.distributed.broadcast(tensor, src=0, group=world.host_group)
    digests = gather_objects(world, _digest(model))
    if len(set(digests)) > 1:
        raise UserError(
            f"the ranks begin with different weights ({', '.join(digests)}) of "
            f"{found[0] / MODEL if found else 'train.init'}: does every host see the same disk?"
        )
    model.backbone.freeze(job.train.freeze_backbone)
    recompute_activations(model, job.train.activation_checkpointing)
    if job.train.compile:
        model.transformer.compile(dynamic=True)  # one graph; after too many odd sizes torch goes on without
    return model.train()


def _load_checkpoint(model: nn.Module, path: Path) -> None:
    try:
        model.load_state_dict(load_model_weights(path))
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"{path / MODEL}: not the weights of its model: {why}; go on from another checkpoint"
        ) from error


def is_path(source: str) -> bool:
    """Whether a value of `train.init` names a file or folder, not a download or a registered version."""
    return source != "imagenet" and "://" not in source and not source.startswith("models:/")


def _load_initial_weights(model: nn.Module, init: InitSection, root: Path, parent: Path | None) -> None:
    try:
        if init.backbone is not None:
            report = load_backbone(model, root / init.backbone if is_path(init.backbone) else init.backbone)
            logger.info("train.init.backbone: %s", report)
        if init.weights is not None:
            source = parent if init.is_registered else weights_in(root / init.weights)
            if source is None:
                asks = "`raydetr train` and `raydetr run` alone ask the registry"
                raise UserError(f"train.init.weights: {init.weights}: {asks}; name a file of weights")
            report = load_weights(model, source, reset_heads=init.reset_heads)
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


def check_init(init: InitSection, checkpoints: Path) -> None:
    """Raise a UserError where `train.init` names a path that is not there, unless training has begun already.

    The workers would meet it, after the data is sharded and they have been started.
    """
    if latest(checkpoints) is not None:
        return
    for key, source in (("backbone", init.backbone), ("weights", init.weights)):
        if source is not None and is_path(source) and not Path(source).exists():
            raise UserError(f"train.init.{key}: {source}: there is no such file or folder")


def hindrance(model: DetrConfig, train: TrainSection, samples: int) -> str | None:
    """Tell which settings are not for weights that begin at random, as most defaults are not, and what to set.

    Args:
        model: the architecture.
        train: how it is trained.
        samples: images of the training split.

    Returns:
        None where nothing is in the way, or `train.init` gives weights.
    """
    if train.init.backbone is not None or train.init.weights is not None:
        return None
    mends = []
    if train.freeze_backbone != "none":
        mends.append("train.freeze_backbone: none")
    if train.lr_backbone < train.lr / 2:
        mends.append(f"train.lr_backbone: {train.lr:g}")
    if model.backbone_norm == "frozen_batch_norm" and not model.has_vision_transformer:
        mends.append("model.backbone_norm: group_norm")
    steps = train.total_steps(samples)
    if steps < LEAST_STEPS and train.max_steps is None:
        mends.append(f"{LEAST_STEPS} steps or more by train.epochs and train.global_batch (these are {steps})")
    if not mends:
        return None
    return (
        "the weights begin at random, and the settings are for some that have learnt: "
        f"set {', '.join(mends)}; or give train.init.backbone or train.init.weights"
    )
