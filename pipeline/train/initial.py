"""The model that training begins or goes on with: initial, given or saved weights, equal on every rank."""

import hashlib
from pathlib import Path

import torch
from torch import nn

from model.build import build_model
from model.recompute import recompute_activations
from model.weights.files import load_backbone, load_weights
from pipeline.checkpoint.state import MODEL, State, latest, load_model_weights, weights_in
from pipeline.config.keys import with_keys
from pipeline.config.sections import InitSection
from pipeline.distributed import World, gather_objects, on_rank_zero, together
from pipeline.errors import UserError
from pipeline.log import get_logger
from pipeline.train.run import TrainJob

logger = get_logger(__name__)


def make_model(job: TrainJob, found: tuple[Path, State] | None, world: World) -> nn.Module:
    """The model with the weights that training goes on from or begins with, the same on every rank."""
    torch.manual_seed(job.train.seed)
    model = build_model(job.model)
    if found is not None:
        together(world, lambda: _load_checkpoint(model, found[0]))
    elif job.train.init.backbone is not None or job.train.init.weights is not None:
        on_rank_zero(world, lambda: _load_initial_weights(model, job.train.init, job.root))
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
    """Whether a value of `train.init` names a file or folder, not a download."""
    return source != "imagenet" and "://" not in source


def _load_initial_weights(model: nn.Module, init: InitSection, root: Path) -> None:
    try:
        if init.backbone is not None:
            report = load_backbone(model, root / init.backbone if is_path(init.backbone) else init.backbone)
            logger.info("train.init.backbone: %s", report)
        if init.weights is not None:
            report = load_weights(model, weights_in(root / init.weights), reset_heads=init.reset_heads)
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
