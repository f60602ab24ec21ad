"""Ranks of a training run for tests: processes that stay, so that torch and DeepSpeed are imported once."""

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

START_SECONDS = 120
CALL_SECONDS = 120


def processes() -> Any:
    """A multiprocessing context whose processes have everything imported."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "pipeline.train"])
    return context


class Ranks:
    """Processes with a gloo process group among them."""

    def __init__(self, size: int, store: Path) -> None:
        context = processes()
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, str(store)), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers(START_SECONDS)

    def outcomes(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(world, *arguments)` returns or raises on each rank."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        return self._answers(CALL_SECONDS)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(world, *arguments)` returns on each rank; raises what one raised."""
        results = self.outcomes(function, *arguments)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def _answers(self, seconds: float) -> list[Any]:
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(seconds):
                self._tell_where_they_are()
                raise AssertionError(f"rank {rank} did not answer within {seconds} s; those before it: {answers}")
            answers.append(pipe.recv())
        return answers

    def _tell_where_they_are(self) -> None:
        """Have each write the stacks of its threads to the error output, with its answer where it has given one."""
        for rank, (pipe, process) in enumerate(zip(self._pipes, self._processes, strict=True)):
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(1)  # so that their stacks do not mix
            print(f"rank {rank}:", pipe.recv() if pipe.poll() else "no answer", file=sys.stderr)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


@contextmanager
def ranks_of(size: int, store: Path) -> Iterator[Ranks]:
    """`size` ranks, meeting over the file `store`."""
    ranks = Ranks(size, store)
    try:
        yield ranks
    finally:
        ranks.close()


def _serve(pipe: Connection, rank: int, size: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    from pipeline.distributed import init_world

    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    world = init_world("cpu")
    pipe.send(None)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(function(world, *arguments))
        except UserError as error:
            pipe.send(error)
        except Exception:
            pipe.send(RuntimeError(f"rank {rank}: {traceback.format_exc()}"))
