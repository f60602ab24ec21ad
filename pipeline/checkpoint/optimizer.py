"""AdamW's state out of a DeepSpeed engine and back, by parameter name, whole whatever the ZeRO stage."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from pipeline.checkpoint.state import MODEL, OPTIMIZER, STATE, State, load_model_weights
from pipeline.checkpoint.weights import differing_weights, on_host
from pipeline.config.values import differences
from pipeline.distributed import World
from pipeline.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Member:
    """A parameter within the flat tensors that ZeRO makes of a group."""

    name: str
    shape: torch.Size
    pieces: tuple[tuple[int, int, int], ...]
    """Of each rank: the first of the parameter's elements that it has and the one after the last, and where in its
    partition they begin."""


@dataclass(frozen=True)
class _FlatGroup:
    """A parameter group as ZeRO has it: end to end in flat tensors, one a rank, padded to equal lengths."""

    partition: torch.Tensor
    """This rank's part of the fp32 master, the key of the base optimizer's state."""
    model: torch.Tensor
    """The same part of the model's weights."""
    members: tuple[_Member, ...]


def _flat_groups(engine: Any, world: World) -> list[_FlatGroup]:
    names = {id(weight): name for name, weight in engine.module.named_parameters()}
    make = _sharded_groups if engine.zero_optimization_stage() == 3 else _joined_groups
    groups = make(engine.optimizer, world, names)
    found = sorted(member.name for group in groups for member in group.members)
    assert found == sorted(name for group in engine.basic_optimizer.param_groups for name in group["names"])
    return groups


def _joined_groups(zero: Any, world: World, names: dict[int, str]) -> list[_FlatGroup]:
    """At stages 1 and 2 all parameters of a group lie end to end, and the whole is cut evenly over the ranks."""
    assert not zero.round_robin_gradients, "round_robin_gradients permutes the parameters"
    groups = []
    for index, partition in enumerate(zero.single_partition_of_fp32_groups):
        size, members = partition.numel(), []
        offsets = zero.round_robin_bit16_offsets[index]
        for weight, offset in zip(zero.round_robin_bit16_groups[index], offsets, strict=True):
            pieces = []
            for first in range(0, world.size * size, size):
                begin, end = max(offset, first), min(offset + weight.numel(), first + size)
                pieces.append((begin - offset, max(begin, end) - offset, begin - first))
            members.append(_Member(names[id(weight)], weight.shape, tuple(pieces)))
        model = zero.parallel_partitioned_bit16_groups[index][world.rank]
        groups.append(_FlatGroup(partition, model, tuple(members)))
    return groups


def _sharded_groups(zero: Any, world: World, names: dict[int, str]) -> list[_FlatGroup]:
    """At stage 3 each parameter is cut evenly over the ranks, and the parts of a rank lie end to end."""
    groups = []
    for index, weights in enumerate(zero.fp16_groups):
        members, at = [], 0
        for weight in weights:
            size, count = weight.ds_tensor.ds_numel, weight.ds_numel
            bounds = [min(rank * size, count) for rank in range(world.size + 1)]
            pieces = tuple((begin, end, at) for begin, end in itertools.pairwise(bounds))
            members.append(_Member(names[id(weight)], weight.ds_shape, pieces))
            at += size
        flat = zero.fp32_partitioned_groups_flat[index], zero.fp16_partitioned_groups_flat[index]
        groups.append(_FlatGroup(*flat, tuple(members)))
    return groups


def gather_moments(engine: Any, world: World) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter name, whole; collective, and empty but on rank 0.

    At ZeRO stage 0 the tensors are the optimizer's own: they change with the next step.
    """
    state, moments = engine.basic_optimizer.state, {}
    if engine.zero_optimization_stage() == 0:
        if world.rank == 0:
            for group in engine.basic_optimizer.param_groups:
                for name, parameter in zip(group["names"], group["params"], strict=True):
                    for key in (*MOMENTS, "step"):
                        moments[f"{name}/{key}"] = state[parameter][key]
        return moments
    for flat in _flat_groups(engine, world):
        entry = state.get(flat.partition) or _no_moments(flat.partition)  # none where every step has overflowed
        for key in MOMENTS:
            own = entry[key].to(world.device)  # from the host, with train.offload
            parts = [torch.empty_like(own) for _ in range(world.size)]
            dist.all_gather(parts, own)
            if world.rank == 0:
                for member in flat.members:
                    pieces = zip(parts, member.pieces, strict=True)
                    whole = torch.cat([part[at : at + end - begin] for part, (begin, end, at) in pieces])
                    moments[f"{member.name}/{key}"] = on_host(whole.view(member.shape))
        if world.rank == 0:
            for member in flat.members:
                moments[f"{member.name}/step"] = entry["step"].clone()
    return moments


def _no_moments(partition: torch.Tensor) -> dict[str, torch.Tensor]:
    """What AdamW begins with."""
    return {key: torch.zeros_like(partition, requires_grad=False) for key in MOMENTS} | {"step": torch.tensor(0.0)}


def restore_optimizer(engine: Any, world: World, path: Path, state: State) -> None:
    """Put the optimizer's state of a checkpoint into a fresh engine, whose model has the checkpoint's weights already.

    The groups must have the learning rates of the checkpoint's last step, to be compared with what was saved.

    Raises:
        UserError: the file is missing or damaged, or not that of this model; it names the file and what differs.
    """
    saved = _Saved(path / OPTIMIZER, state.updates)
    if engine.zero_optimization_stage() == 0:
        _restore_whole(engine, saved)
    else:
        _restore_partitions(engine, world, saved)
    _check_groups(engine.basic_optimizer, path / STATE, state)
    _check_weights(engine, world, path)
    if engine.zero_optimization_stage() > 0:
        _check_masters(engine, world)


class _Saved:
    """The tensors of a checkpoint's optimizer file, which are checked as they are read."""

    def __init__(self, file: Path, step: int) -> None:
        self._file, self._step = file, step
        with self._told():
            self._tensors: Any = safe_open(file, framework="pt")

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self._file}: cannot be read ({error}); go on from another checkpoint") from error

    def moment(self, name: str, key: str, shape: torch.Size) -> torch.Tensor:
        """`<name>/<key>`, which must have the shape of the parameter."""
        with self._told():
            tensor: torch.Tensor = self._tensors.get_tensor(f"{name}/{key}")
        if tensor.shape != shape or tensor.dtype != torch.float32:
            raise UserError(
                f"{self._file}: {name}/{key} is {tensor.dtype} {list(tensor.shape)}, the model's is "
                f"{torch.float32} {list(shape)}; go on from another checkpoint"
            )
        return tensor

    def step(self, name: str) -> torch.Tensor:
        """`<name>/step`, which must be that of the state."""
        with self._told():
            tensor: torch.Tensor = self._tensors.get_tensor(f"{name}/step")
        if tensor.numel() != 1 or tensor.item() != self._step:
            raise UserError(
                f"{self._file}: {name}/step is {tensor.tolist()}, {STATE} says {self._step}; "
                "go on from another checkpoint"
            )
        return tensor


def _restore_whole(engine: Any, saved: _Saved) -> None:
    for group in engine.basic_optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            entry = {"step": saved.step(name)} | {key: saved.moment(name, key, parameter.shape) for key in MOMENTS}
            engine.basic_optimizer.state[parameter] = {
                key: tensor.to(parameter.device) for key, tensor in entry.items()
            }


def _restore_partitions(engine: Any, world: World, saved: _Saved) -> None:
    for flat in _flat_groups(engine, world):
        steps = [saved.step(member.name) for member in flat.members]
        entry = {"step": steps[0].to(flat.partition.device)}
        for key in MOMENTS:
            part = torch.zeros(flat.partition.numel())
            for member in flat.members:
                begin, end, at = member.pieces[world.rank]
                if begin < end:
                    part[at : at + end - begin] = saved.moment(member.name, key, member.shape).view(-1)[begin:end]
            entry[key] = part.to(flat.partition.device)
        engine.basic_optimizer.state[flat.partition] = entry


def _check_groups(optimizer: torch.optim.Optimizer, file: Path, state: State) -> None:
    """The groups must have the settings that they were saved with."""
    own = {f"groups.{number}": group for number, group in enumerate(group_settings(optimizer))}
    changed = differences({f"groups.{number}": group for number, group in enumerate(state.groups)}, own)
    if changed:
        raise UserError(
            f"{file}: other parameter groups than those of its settings ({'; '.join(changed)}); "
            "go on from another checkpoint, or with the version that wrote it"
        )


def _check_weights(engine: Any, world: World, path: Path) -> None:
    """The model must have the weights that were saved."""
    differing = differing_weights(engine, world, load_model_weights(path))
    if differing:
        raise UserError(
            f"{path / MODEL}: {', '.join(differing)} of the model is not the saved one; the file has changed meanwhile"
        )


def _check_masters(engine: Any, world: World) -> None:
    """What would go wrong in silence: a master that is not the model."""
    for index, flat in enumerate(_flat_groups(engine, world)):
        assert torch.equal(flat.model.float().to(flat.partition.device), flat.partition), (
            f"the master of group {index} is not the model"
        )


def group_settings(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], ...]:
    """Name, lr, weight_decay, betas and eps of every group, as JSON gives them back."""
    return tuple(
        {
            "name": group["name"],
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
            "betas": list(group["betas"]),
            "eps": group["eps"],
        }
        for group in optimizer.param_groups
    )
