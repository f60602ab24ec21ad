"""Writing checkpoints, and removing old ones.

A checkpoint is written to a `.tmp` folder, flushed to the disk and renamed: whatever kills the process, the newest
whole folder stays. This happens beside training: the tensors are copied while the next step computes its gradients,
and written while training goes on.
"""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from model.weights.files import save_tensors
from pipeline.checkpoint.find import set_aside
from pipeline.checkpoint.optimizer import gather_moments
from pipeline.checkpoint.state import DIGEST, EMA, MODEL, NAME, OPTIMIZER, STATE, State, checkpoints, latest
from pipeline.checkpoint.weights import gather_weights, on_host
from pipeline.config.values import digest
from pipeline.distributed import World, raise_together
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


class CheckpointWriter:
    """Writes checkpoints one at a time, in a thread of rank 0; the other ranks wait for nothing.

    Args:
        world: this process.
        folder: the run's `checkpoints` folder.
        keep: newest checkpoints that stay; None for all.
        best: gives the name of another that stays, if one does: the best so far.
        spool: of the training curves, whose points are flushed to the disk before the checkpoint after them is there.
        written: called when it is there, before the next is begun and before `finish` is done.
    """

    def __init__(
        self,
        world: World,
        folder: Path,
        keep: int | None,
        best: Callable[[], str | None] = lambda: None,
        spool: Path | None = None,
        written: Callable[[], None] = lambda: None,
    ) -> None:
        self._world, self._folder, self._keep, self._best, self._spool = world, folder, keep, best, spool
        self._is_written = written
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None
        self._copied = threading.Event()
        self._copied.set()
        self.error: Exception | None = None
        """What this rank has met, for the ranks to agree on: rank 0 alone must not give up."""

    def begin(self, engine: Any, state: State, averages: Mapping[str, torch.Tensor] | None = None) -> Path:
        """Begin checkpoint-<step>; collective. Until `wait_copied` the weights must not change.

        Args:
            engine: the DeepSpeed engine, at any ZeRO stage, after at least one step.
            state: goes into state.json.
            averages: of the trained weights, by name, where the run keeps them.

        Returns:
            The folder that will be there.

        Raises:
            UserError: the disk did not take the one before; the checkpoints before that are whole. On every rank.
        """
        self.finish()
        files = {MODEL: gather_weights(engine, self._world), OPTIMIZER: gather_moments(engine, self._world)}
        if averages is not None:
            files[EMA] = gather_weights(engine, self._world, averages)
        if self._world.rank == 0:
            self._copied.clear()
            is_on_gpu = self._world.device.type == "cuda"
            gathered = torch.cuda.current_stream().record_event() if is_on_gpu else None
            self._written = self._thread.submit(self._copy_and_write, files, state, gathered)
        return _path(self._folder, state)

    def wait_copied(self) -> None:
        """Wait until the weights may change again."""
        self._copied.wait()

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is there; collective.

        Raises:
            UserError: the disk did not take it; the checkpoints before it are whole. On every rank.
        """
        if self._written is not None:
            self._written.result()
        raise_together(self._world, self.error)

    def close(self) -> None:
        """Wait until the checkpoint that was begun is there or has failed, alone; none can be begun after it."""
        self._thread.shutdown()

    def _copy_and_write(
        self, files: dict[str, dict[str, torch.Tensor]], state: State, gathered: torch.cuda.Event | None
    ) -> None:
        try:
            copies = self._copy(files, gathered)
            if self._spool is not None and self._spool.exists():
                sync(self._spool)
            path = _write(self._folder, copies, state)
            self._is_written()
            logger.info("%s written", path)
            self._remove_old()
        except Exception as error:
            self.error = error

    def _remove_old(self) -> None:
        old = checkpoints(self._folder)[: -self._keep] if self._keep else []
        best = self._best() if old else None
        for path in old:
            if path.name != best:
                # Under this name a half-removed folder is no checkpoint, and `clean` removes the rest.
                shutil.rmtree(path.rename(path.with_name(f"{path.name}.tmp")))

    def _copy(
        self, files: dict[str, dict[str, torch.Tensor]], gathered: torch.cuda.Event | None
    ) -> dict[str, dict[str, torch.Tensor]]:
        try:
            # On a stream of its own, so that it waits for no kernel of the next step.
            stream = torch.cuda.Stream(self._world.device) if gathered else None  # type: ignore[no-untyped-call]
            if stream is not None and gathered is not None:
                stream.wait_event(gathered)
            with torch.cuda.stream(stream):  # does nothing with None
                return {file: {name: on_host(tensor) for name, tensor in own.items()} for file, own in files.items()}
        finally:
            self._copied.set()


def _path(folder: Path, state: State) -> Path:
    return folder / f"checkpoint-{state.step}"


def _write(folder: Path, files: dict[str, dict[str, torch.Tensor]], state: State) -> Path:
    assert files.keys() == set(state.names)
    path = _path(folder, state)
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
