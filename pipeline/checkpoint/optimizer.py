"""AdamW's state out of a DeepSpeed engine and back, by parameter name, whole whatever the ZeRO stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from pipeline.checkpoint.state import OPTIMIZER, State, load_model_weights
from pipeline.distributed import World
from pipeline.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of its own: names that share a tensor, and views of ZeRO's flat buffers, cannot be saved as they are."""
    return tensor.detach().to("cpu", copy=True).contiguous()


@dataclass(frozen=True)
class _FlatGroup:
    """A parameter group of ZeRO stage 1: all its parameters end to end in one padded tensor, cut evenly over ranks."""

    partition: torch.Tensor  # this rank's part of the fp32 master, the key of the base optimizer's state
    members: tuple[tuple[str, int, torch.Size], ...]  # name, offset in the whole, shape


def _flat_groups(engine: Any) -> list[_FlatGroup]:
    zero, groups = engine.optimizer, []
    assert not zero.round_robin_gradients, "round_robin_gradients permutes the parameters"
    for index, group in enumerate(engine.basic_optimizer.param_groups):
        parameters, offsets = zero.round_robin_bit16_groups[index], zero.round_robin_bit16_offsets[index]
        assert len(parameters) == len(group["names"]) == len(offsets)
        members = zip(group["names"], offsets, (parameter.shape for parameter in parameters), strict=True)
        groups.append(_FlatGroup(zero.single_partition_of_fp32_groups[index], tuple(members)))
    return groups


def gather_moments(engine: Any, world: World) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter name, whole, on the host; collective, and empty but on rank 0."""
    state, moments = engine.basic_optimizer.state, {}
    if engine.zero_optimization_stage() == 0:
        if world.rank == 0:
            for group in engine.basic_optimizer.param_groups:
                for name, parameter in zip(group["names"], group["params"], strict=True):
                    for key in (*MOMENTS, "step"):
                        moments[f"{name}/{key}"] = on_host(state[parameter][key])
        return moments
    for flat in _flat_groups(engine):
        for key in MOMENTS:
            part = state[flat.partition][key]
            parts = [torch.empty_like(part) for _ in range(world.size)]
            dist.all_gather(parts, part)
            if world.rank == 0:
                whole = torch.cat(parts)
                for name, offset, shape in flat.members:
                    moments[f"{name}/{key}"] = on_host(whole[offset : offset + shape.numel()].view(shape))
        if world.rank == 0:
            for name, _, _ in flat.members:
                moments[f"{name}/step"] = on_host(state[flat.partition]["step"])
    return moments


def restore_optimizer(engine: Any, world: World, path: Path, state: State) -> None:
    """Put the optimizer's state of a checkpoint into a fresh engine, whose model has the checkpoint's weights already.

    The groups must have the learning rates of the checkpoint's last step, to be compared with what was saved.

    Raises:
        UserError: the file is missing or damaged, or not that of this model.
    """
    try:
        with safe_open(path / OPTIMIZER, framework="pt") as moments:
            if engine.zero_optimization_stage() == 0:
                _restore_whole(engine, moments)
            else:
                _restore_partitions(engine, world, moments)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path / OPTIMIZER}: cannot be read ({error}); delete {path} and go on from another"
        ) from error
    _check_restored(engine, world, path, state)


def _restore_whole(engine: Any, moments: Any) -> None:
    for group in engine.basic_optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            engine.basic_optimizer.state[parameter] = {
                key: moments.get_tensor(f"{name}/{key}").to(parameter.device) for key in ("step", *MOMENTS)
            }


def _restore_partitions(engine: Any, world: World, moments: Any) -> None:
    for flat in _flat_groups(engine):
        size = flat.partition.numel()
        first = world.rank * size
        entry = {"step": moments.get_tensor(f"{flat.members[0][0]}/step").to(flat.partition.device)}
        for key in MOMENTS:
            part = torch.zeros(size)
            for name, offset, shape in flat.members:
                begin, end = max(offset, first), min(offset + shape.numel(), first + size)
                if begin < end:
                    whole = moments.get_tensor(f"{name}/{key}").view(-1)
                    part[begin - first : end - first] = whole[begin - offset : end - offset]
            entry[key] = part.to(flat.partition.device)
        engine.basic_optimizer.state[flat.partition] = entry


def _check_restored(engine: Any, world: World, path: Path, state: State) -> None:
    """What would go wrong in silence: settings of groups, steps, and a master that is not the model."""
    optimizer = engine.basic_optimizer
    assert group_settings(optimizer) == state.groups, f"{path}: other parameter groups"
    assert all(entry["step"] == state.step for entry in optimizer.state.values()), f"{path}: another step"
    weights = load_model_weights(path)
    for name, parameter in engine.module.state_dict().items():
        assert torch.equal(parameter.cpu(), weights[name]), f"{path}: {name} of the model is not the saved one"
    if engine.zero_optimization_stage() == 1:
        for index, flat in enumerate(_flat_groups(engine)):
            own = engine.optimizer.parallel_partitioned_bit16_groups[index][world.rank]
            assert torch.equal(own.float(), flat.partition), f"{path}: the master of group {index} is not the model"


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
