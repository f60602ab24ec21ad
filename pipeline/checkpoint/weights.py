"""The weights out of a DeepSpeed engine and back, by their names in the state dict."""

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.distributed import World


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of its own: names that share a tensor, and views of ZeRO's flat buffers, cannot be saved as they are."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def trained_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The trained parameters by name, each once."""
    return {name: weight.data for name, weight in engine.module.named_parameters() if weight.requires_grad}


def gather_weights(
    engine: Any, world: World, averages: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The model's state dict, whole, on the host; empty but on rank 0.

    Args:
        engine: the DeepSpeed engine.
        world: this process.
        averages: what stands in place of the tensors of `trained_weights`, by the same names.
    """
    if world.rank != 0:
        return {}
    instead = {id(weight): (averages or {}).get(name) for name, weight in engine.module.named_parameters()}
    weights = {}
    for name, weight in engine.module.state_dict(keep_vars=True).items():
        average = instead.get(id(weight))
        weights[name] = on_host(weight if average is None else average)
    return weights


def restore_averages(averages: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Put the averages of a checkpoint in place of these, which have the names of `trained_weights`.

    Raises:
        ValueError: one is missing, or of another shape or type; it names the tensor.
    """
    for name, average in averages.items():
        if name not in saved or (saved[name].shape, saved[name].dtype) != (average.shape, average.dtype):
            raise ValueError(f"{name} is missing, or not of the model's shape or type")
        average.copy_(saved[name])
