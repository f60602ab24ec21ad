"""The processes of a training run: who they are, and how they agree.

`init_world` works in one plain process, under `torchrun`, and where a process group exists already (Ray Train makes
one). Everything after it gets the `World` as a value. What one rank alone knows (that a file is missing, a loss not
finite) is shared before it is acted upon, so that no rank waits for one that has given up.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from pipeline.errors import UserError

Result = TypeVar("Result")
TIMEOUT_SECONDS = 1800.0
"""Longest wait of a collective for another rank."""


@dataclass(frozen=True)
class World:
    """This process among the `size` processes of the run."""

    rank: int
    """Number of the process, from 0."""
    size: int
    """Number of processes."""
    local_rank: int
    """Number of the process on its machine."""
    device: torch.device
    """Where this process computes."""
    host_group: Any = field(default=None, compare=False, repr=False)
    """Process group for what lives on the host: gloo beside NCCL, so that agreeing does not wait for the GPU."""
    owned: bool = field(default=False, compare=False, repr=False)
    """Whether `init_world` made the process group, so that `close` ends it."""


def _device(kind: Literal["auto", "cpu", "cuda"], local_rank: int) -> torch.device:
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("cluster.device is cuda, but torch finds no GPU here: use cpu or auto, or mend the driver")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def init_world(device: Literal["auto", "cpu", "cuda"] = "auto", timeout: float = TIMEOUT_SECONDS) -> World:
    """Join the run's processes, or make a world of this one process.

    Adopts a process group that exists; else joins the one that `torchrun` describes in the environment; else makes
    one of a single process. `close` ends what was made here.

    Args:
        device: where this process computes.
        timeout: seconds that a collective of a group made here waits for another rank.

    Raises:
        UserError: `device` is cuda and there is none.
    """
    limit = timedelta(seconds=timeout)
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    owned = not dist.is_initialized()
    if owned:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend, init_method="env://", timeout=limit)
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=limit)
    on_host = dist.get_backend() == "gloo"
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        device=chosen,
        host_group=dist.group.WORLD if on_host else dist.new_group(backend="gloo", timeout=limit),
        owned=owned,
    )


def close(world: World) -> None:
    """End the process group if `init_world` made it."""
    if world.owned and dist.is_initialized():
        dist.destroy_process_group()


def begin_sum_over_ranks(world: World, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to sum a tensor over all ranks, in place, while this one goes on; the call gives the sum.

    Tensors on the host do not wait for the GPU.
    """
    group = world.host_group if tensor.device.type == "cpu" else None
    work = dist.all_reduce(tensor, group=group, async_op=True) if world.size > 1 else None

    def wait() -> torch.Tensor:
        if work is not None:
            work.wait()
        return tensor

    return wait


def gather_objects(world: World, value: Any) -> list[Any]:
    """The values of all ranks, by rank, on every rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=world.host_group)
    return values


def broadcast_object(world: World, value: Result) -> Result:
    """Rank 0's value, on every rank."""
    if world.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=world.host_group)
    return values[0]


def raise_together(world: World, error: Exception | None) -> None:
    """Raise on every rank what any rank has met; every rank calls it, with None where all is well.

    A rank that is well raises the same type of error with the same message: `UserError` stays one.
    """
    told = gather_objects(world, None if error is None else (isinstance(error, UserError), f"{error}"))
    if error is not None:
        raise error
    for rank, told_error in enumerate(told):
        if told_error is not None:
            is_user_error, message = told_error
            raise UserError(message) if is_user_error else RuntimeError(f"rank {rank} failed: {message}")


def together(world: World, work: Callable[[], Result]) -> Result:
    """Each rank's own result of `work`; what fails on one rank is raised on all."""
    result: list[Result] = []
    error: Exception | None = None
    try:
        result.append(work())
    except Exception as caught:
        error = caught
    raise_together(world, error)
    return result[0]


def on_rank_zero(world: World, work: Callable[[], Result]) -> Result:
    """Rank 0's result of `work`, on every rank; what fails there is raised on all."""
    result = together(world, lambda: work() if world.rank == 0 else None)
    return broadcast_object(world, result)  # type: ignore[return-value]
