"""Writing checkpoints, and removing old ones.

A checkpoint is written to a `.tmp` folder, flushed to the disk and renamed: whatever kills the process, the newest
whole folder stays.
"""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from model.weights.files import save_tensors
from pipeline.checkpoint.find import set_aside
from pipeline.checkpoint.optimizer import gather_moments
from pipeline.checkpoint.state import DIGEST, EMA, MODEL, NAME, OPTIMIZER, STATE, State, checkpoints, latest
from pipeline.checkpoint.weights import gather_weights
from pipeline.config.values import digest
from pipeline.distributed import World, on_rank_zero
from pipeline.errors import UserError
from pipeline.files import sha256_of, sync
from pipeline.log import get_logger

logger = get_logger(__name__)


def clean(folder: Path) -> None:
    """Remove what a killed process left half-written or half-removed, and set aside folders without a state.json.

    Raises:
        UserError: a folder cannot be set aside.
    """
    for path in sorted(folder.glob("checkpoint-*")):
        if path.suffix == ".tmp" and NAME.fullmatch(path.stem):
            logger.warning("removing %s, which was never finished", path)
            shutil.rmtree(path, ignore_errors=True)
        elif NAME.fullmatch(path.name) and not (path / STATE).is_file():
            set_aside(path, f"{path / STATE}: is missing")


def save(
    engine: Any,
    world: World,
    folder: Path,
    state: State,
    keep: int | None,
    averages: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write checkpoint-<step> and remove all but the newest `keep`; every rank takes part, rank 0 writes.

    Args:
        engine: the DeepSpeed engine, at any ZeRO stage, after at least one step.
        world: this process.
        folder: the run's `checkpoints` folder.
        state: goes into state.json.
        keep: newest checkpoints that stay; None for all.
        averages: of the trained weights, by name, where the run keeps them.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: the disk does not take it; the checkpoints before it are whole. Raised on every rank.
    """
    files = {MODEL: gather_weights(engine, world), OPTIMIZER: gather_moments(engine, world)}
    if averages is not None:
        files[EMA] = gather_weights(engine, world, averages)

    def write() -> Path:
        path = _write(folder, files, state)
        for old in checkpoints(folder)[: -keep if keep else 0]:
            # Under this name a half-removed folder is no checkpoint, and `clean` removes the rest.
            shutil.rmtree(old.rename(old.with_name(f"{old.name}.tmp")))
        return path

    return on_rank_zero(world, write)


def _write(folder: Path, files: dict[str, dict[str, torch.Tensor]], state: State) -> Path:
    assert files.keys() == set(state.names)
    path = folder / f"checkpoint-{state.step}"
    temporary = folder / f"{path.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, tensors in files.items():
            save_tensors(tensors, temporary / name)
        (temporary / STATE).write_text(_state_text(temporary, state), encoding="utf-8")
        for name in (*files, STATE):
            sync(temporary / name)
        sync(temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        size = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values()) / 2**20
        reason = os.strerror(error.errno or errno.EIO) if isinstance(error, OSError) else str(error)
        before = latest(folder)
        intact = f"{before.name} is whole: then run the same command again to go on from it" if before else "try again"
        raise UserError(
            f"{path}: cannot be written ({reason}); it needs {size:.1f} MiB. Make room; {intact}"
        ) from error
    return path


def _state_text(path: Path, state: State) -> str:
    """state.json of the files that lie in a folder."""
    sums = {name: sha256_of(path / name) for name in state.names}
    content = asdict(replace(state, files=sums))
    return json.dumps({**content, DIGEST: digest(content)}, indent=1)
