"""Checkpoints that belong to no world size and no ZeRO stage; this module alone writes and finds them.

    <run>/checkpoints/checkpoint-<step>/
        model.safetensors      every parameter and buffer, frozen ones included, by state-dict name
        optimizer.safetensors  <parameter name>/exp_avg, /exp_avg_sq, /step of AdamW, whole, never sharded
        state.json             where training stands and what it was made with; without it there is no checkpoint

Parameters are kept in fp32 at every precision, so the weights are their own master copy. A checkpoint is written to a
`.tmp` folder, flushed to the disk and renamed: whatever kills the process, the newest whole folder stays.
"""

import errno
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from model.config import DetrConfig
from model.weights.files import save_tensors
from pipeline.distributed import World, on_rank_zero
from pipeline.errors import UserError
from pipeline.files import sync
from pipeline.log import get_logger

logger = get_logger(__name__)

FORMAT = 1
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class State:
    """Where a training run stands, and what it was made with: the content of state.json."""

    step: int
    """Optimizer steps done."""
    epoch: int
    """Epochs done."""
    samples: int
    """Samples of the stream that were taken, those left out as unreadable included."""
    skipped: int
    """Samples that were left out because they could not be read."""
    seeds: dict[str, int]
    """Seeds of the run by what they seed."""
    world_size: int
    """Processes that wrote it; another number may go on."""
    zero_stage: int
    """ZeRO stage that wrote it; another may go on."""
    config: dict[str, Any]
    """Sections `model` (with num_classes) and `train`, as plain values."""
    labels: dict[str, Any]
    """Label map of the data, as JSON."""
    data_digest: str
    """Digest of the manifest of the training split."""
    groups: tuple[dict[str, Any], ...]
    """Settings of the optimizer's groups at the last step: name, lr, weight_decay, betas, eps."""
    format: int = FORMAT
    """Version of the layout."""

    def detr_config(self) -> DetrConfig:
        """The architecture whose weights these are.

        Raises:
            UserError: this version does not know one of its settings.
        """
        try:
            return DetrConfig(**self.config["model"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{STATE}: its model is not one that this version knows ({error}); use the version that wrote it"
            ) from error


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints below a `checkpoints` folder, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / STATE).is_file()]


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint below a `checkpoints` folder, or None."""
    return next(reversed(checkpoints(folder)), None)


def read_state(path: Path) -> State:
    """What state.json of a checkpoint says.

    Raises:
        UserError: `path` is no checkpoint, or one of another format.
    """
    file = path / STATE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); a checkpoint folder has one") from error
    except ValueError as error:
        raise UserError(f"{file}: is not JSON ({error}); delete {path}, and the checkpoint before it is used") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UserError(f"{file}: is not of format {FORMAT}, the one this version reads; use the version that wrote it")
    missing = {field.name for field in fields(State)} - values.keys()
    if missing:
        raise UserError(f"{file}: lacks {', '.join(sorted(missing))}; delete {path}, and the one before it is used")
    known = {field.name: values[field.name] for field in fields(State)}
    return State(**{**known, "groups": tuple(known["groups"])})


def load_model_weights(path: Path) -> dict[str, torch.Tensor]:
    """The model's state dict of a checkpoint, on the host.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return load_file(path / MODEL)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path / MODEL}: cannot be read ({error}); delete {path} and go on from another") from error


def clean(folder: Path) -> None:
    """Remove what a killed process left half-written, and folders without a state.json."""
    whole = set(checkpoints(folder))
    for path in folder.glob("checkpoint-*"):
        if path not in whole and _NAME.fullmatch(path.name.removesuffix(".tmp")):
            logger.warning("removing %s, which was never finished", path)
            shutil.rmtree(path, ignore_errors=True)


def save(engine: Any, world: World, folder: Path, state: State, keep: int | None) -> Path:
    """Write checkpoint-<step> and remove all but the newest `keep`; every rank takes part, rank 0 writes.

    Args:
        engine: the DeepSpeed engine, at ZeRO stage 0 or 1, after at least one step.
        world: this process.
        folder: the run's `checkpoints` folder.
        state: goes into state.json.
        keep: newest checkpoints that stay; None for all.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: the disk does not take it; the checkpoints before it are whole. Raised on every rank.
    """
    moments = _gather_moments(engine, world)

    def write() -> Path:
        weights = {name: _on_host(tensor) for name, tensor in engine.module.state_dict().items()}
        path = _write(folder, weights, moments, state)
        for old in checkpoints(folder)[: -keep if keep else 0]:
            # Without state.json first, so that a half-removed folder is no checkpoint.
            (old / STATE).unlink()
            shutil.rmtree(old)
        return path

    return on_rank_zero(world, write)


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of its own: names that share a tensor, and views of ZeRO's flat buffers, cannot be saved as they are."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _write(folder: Path, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], state: State) -> Path:
    path = folder / f"checkpoint-{state.step}"
    temporary = folder / f"{path.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_tensors(weights, temporary / MODEL)
        save_tensors(moments, temporary / OPTIMIZER)
        (temporary / STATE).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        for file in (MODEL, OPTIMIZER, STATE):
            sync(temporary / file)
        sync(temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        size = sum(tensor.nbytes for tensor in (*weights.values(), *moments.values())) / 2**20
        reason = os.strerror(error.errno or errno.EIO) if isinstance(error, OSError) else str(error)
        before = latest(folder)
        intact = f"{before.name} is whole: then run the same command again to go on from it" if before else "try again"
        raise UserError(
            f"{path}: cannot be written ({reason}); it needs {size:.1f} MiB. Make room; {intact}"
        ) from error
    return path


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


def _gather_moments(engine: Any, world: World) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter name, whole, on the host; collective, and empty but on rank 0."""
    state, moments = engine.basic_optimizer.state, {}
    if engine.zero_optimization_stage() == 0:
        if world.rank == 0:
            for group in engine.basic_optimizer.param_groups:
                for name, parameter in zip(group["names"], group["params"], strict=True):
                    for key in (*MOMENTS, "step"):
                        moments[f"{name}/{key}"] = _on_host(state[parameter][key])
        return moments
    for flat in _flat_groups(engine):
        for key in MOMENTS:
            part = state[flat.partition][key]
            parts = [torch.empty_like(part) for _ in range(world.size)]
            dist.all_gather(parts, part)
            if world.rank == 0:
                whole = torch.cat(parts)
                for name, offset, shape in flat.members:
                    moments[f"{name}/{key}"] = _on_host(whole[offset : offset + shape.numel()].view(shape))
        if world.rank == 0:
            for name, _, _ in flat.members:
                moments[f"{name}/step"] = _on_host(state[flat.partition]["step"])
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
