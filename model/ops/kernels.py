"""The compiled operator as torch sees it: its fake kernels, its gradient and its autocast rule.

Importing this module imports the extension `_raydetr`, which registers `torch.ops.raydetr`; it is an ImportError where
the extension was not built. There is no second derivative, which is an error, and no forward-mode derivative.
"""

import importlib
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Size, Tensor
from torch.utils.flop_counter import register_flop_formula

from model.ops.shapes import check_shapes

EXTENSION: Any = importlib.import_module("_raydetr")
CPU_KERNELS: str = EXTENSION.cpu
"""The instruction set that the CPU kernels use here: default, avx2 or avx512."""
CUDA_ARCHITECTURES: str = EXTENSION.cuda
"""The architectures that CUDA kernels were built for, as in TORCH_CUDA_ARCH_LIST; empty without them."""

OPERATOR = "raydetr::ms_deform_attn"


def ms_deform_attn(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """See `model.ops.ms_deform_attn`."""
    flat = [size for shape in spatial_shapes for size in shape]
    sampling_type = _sampling_type(value.dtype)
    output: Tensor = torch.ops.raydetr.ms_deform_attn(
        value, flat, sampling_locations.to(sampling_type), attention_weights.to(sampling_type)
    )
    return output


def _sampling_type(value: torch.dtype) -> torch.dtype:
    """Type of the locations and weights beside values of a type: 16 bits would move a sample by a third of a cell."""
    return torch.promote_types(value, torch.float32)


def _fake(value: Tensor, spatial_shapes: list[int], sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
    pairs = list(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))
    check_shapes(value, pairs, sampling_locations, attention_weights)
    wanted = _sampling_type(value.dtype)
    for name, tensor in (("sampling_locations", sampling_locations), ("attention_weights", attention_weights)):
        if tensor.dtype != wanted:
            raise ValueError(f"{name}: expected {wanted}, got {tensor.dtype}")
        if tensor.device != value.device:
            raise ValueError(f"{name}: not on the device of value")
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, sampling_locations.shape[1], heads * channels)


def _fake_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: list[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    want_value: bool,
    want_locations: bool,
    want_weights: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape if want_value else (0,)),
        sampling_locations.new_empty(sampling_locations.shape if want_locations else (0,)),
        attention_weights.new_empty(attention_weights.shape if want_weights else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.spatial_shapes, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, sampling_locations, attention_weights = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[index] for index in (0, 2, 3)]
    gradients = torch.ops.raydetr.ms_deform_attn_backward(
        grad_output,
        value,
        ctx.spatial_shapes,
        sampling_locations,
        attention_weights,
        *wanted,
        torch.are_deterministic_algorithms_enabled(),
    )
    for_value, for_locations, for_weights = (
        gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)
    )
    return for_value, None, for_locations, for_weights


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> Any:
    raise NotImplementedError(f"{OPERATOR} has no second derivative; model.ops.reference has one")


def _flops(value: Size, spatial_shapes: list[int], locations: Size, weights: Size, *_: Any, **__: Any) -> int:
    """Flops of shapes: 4 multiply-adds to interpolate a sampled channel and 1 to weigh it (appendix A.1)."""
    return 2 * 5 * prod(weights) * value[-1]


def _backward_flops(
    grad_output: Size, value: Size, spatial_shapes: list[int], locations: Size, weights: Size, *_: Any, **__: Any
) -> int:
    """Twice the forward pass, as for a matrix product: gradients of the values, and of where and how they are taken."""
    return 2 * _flops(value, spatial_shapes, locations, weights)


def _autocast(device_type: str) -> Any:
    """Under autocast the values, most of the traffic, take its type; locations and weights are fp32 at least."""

    def cast(
        value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
    ) -> Tensor:
        if value.is_floating_point() and value.dtype != torch.float64:
            value = value.to(torch.get_autocast_dtype(device_type))
        sampling_type = _sampling_type(value.dtype)
        with torch.autocast(device_type, enabled=False):
            output: Tensor = torch.ops.raydetr.ms_deform_attn(
                value, spatial_shapes, sampling_locations.to(sampling_type), attention_weights.to(sampling_type)
            )
            return output

    return cast


def _register() -> None:
    """Tell torch, once a process: a served model brings a copy of this package beside the one that is installed."""
    if getattr(EXTENSION, "registered", False):
        return
    torch.library.register_fake(OPERATOR)(_fake)
    torch.library.register_fake(OPERATOR + "_backward")(_fake_backward)
    torch.library.register_autograd(OPERATOR, _backward, setup_context=_save)
    torch.library.register_autograd(OPERATOR + "_backward", _no_second_derivative)
    register_flop_formula(torch.ops.raydetr.ms_deform_attn)(_flops)
    register_flop_formula(torch.ops.raydetr.ms_deform_attn_backward)(_backward_flops)
    # The registrations below live as long as this object.
    EXTENSION.registered = torch.library.Library("raydetr", "IMPL")  # type: ignore[no-untyped-call]
    for device in ("cpu", "cuda"):
        EXTENSION.registered.impl("ms_deform_attn", _autocast(device), f"Autocast{device.upper()}")


_register()
