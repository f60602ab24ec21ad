"""The weights out of a DeepSpeed engine and back, by their names in the state dict.

Up to ZeRO stage 2 every rank has them whole. At stage 3 each parameter is cut evenly over the ranks, padded at its end,
and a rank's part is its attribute `ds_tensor`.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from pipeline.distributed import World


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of its own: names that share a tensor, and views of ZeRO's flat buffers, cannot be saved as they are."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def trained_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The trained parameters by name, each once; at stage 3 this rank's parts."""
    return {name: _own(weight) for name, weight in engine.module.named_parameters() if weight.requires_grad}


def gather_weights(
    engine: Any, world: World, averages: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The model's state dict, whole; collective, and empty but on rank 0.

    The tensors are the model's own, except for what ZeRO stage 3 has cut: they change with the next step.

    Args:
        engine: the DeepSpeed engine.
        world: this process.
        averages: what stands in place of the tensors of `trained_weights`, by the same names.
    """
    whole = {}
    for name, weight in engine.module.named_parameters():
        own = (averages or {}).get(name, _own(weight))
        if _is_cut(weight):
            parts = [torch.empty_like(own) for _ in range(world.size)]
            dist.all_gather(parts, own.contiguous())
            own = on_host(torch.cat(parts)[: weight.ds_numel].view(weight.ds_shape)) if world.rank == 0 else own
        whole[id(weight)] = own
    if world.rank != 0:
        return {}
    state = engine.module.state_dict(keep_vars=True)
    return {name: whole.get(id(tensor), tensor) for name, tensor in state.items()}


def restore_averages(engine: Any, world: World, averages: Mapping[str, torch.Tensor], saved: Any) -> None:
    """Put the averages of a checkpoint, by name, in place of these, which are like the tensors of `trained_weights`.

    Raises:
        ValueError: one is missing, or of another shape or type; it names the tensor.
    """
    weights = dict(engine.module.named_parameters())
    for name, average in averages.items():
        shape = weights[name].ds_shape if _is_cut(weights[name]) else average.shape
        if name not in saved or (saved[name].shape, saved[name].dtype) != (shape, average.dtype):
            raise ValueError(f"{name} is missing, or not of the model's shape or type")
        part = _part(weights[name], saved[name], world)
        average.view(-1)[: part.numel()] = part.view(-1)


def differing_weights(engine: Any, world: World, saved: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the model's tensors that are not, bit for bit, the saved ones; at stage 3 as far as this rank sees."""
    differing = []
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        if name in saved:
            part = _part(tensor, saved[name], world)
            own = _own(tensor).cpu()
            own = own[: part.numel()] if _is_cut(tensor) else own
        if name not in saved or not torch.equal(own, part):
            differing.append(name)
    return differing


def _is_cut(tensor: torch.Tensor) -> bool:
    """Whether ZeRO stage 3 has cut a parameter."""
    return hasattr(tensor, "ds_tensor")


def _own(tensor: Any) -> torch.Tensor:
    """What this rank has of a parameter; a buffer is whole."""
    own: torch.Tensor = tensor.ds_tensor.data if _is_cut(tensor) else tensor.data
    return own


def _part(tensor: Any, whole: torch.Tensor, world: World) -> torch.Tensor:
    """What this rank has of `whole`, without padding, when it is cut like a tensor of the model."""
    if not _is_cut(tensor):
        return whole
    size = tensor.ds_tensor.ds_numel
    return whole.view(-1)[world.rank * size : (world.rank + 1) * size]
