"""The typed multi-scale deformable attention operator (arXiv 2010.04159, equation 3).

Shapes: B batch, S cells of all levels, M heads, D channels of a head, Q queries, L levels, P points.
"""

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from model.ops import reference
from model.ops.shapes import check_shapes

try:
    from model.ops import kernels
except ImportError as error:
    kernels = None  # type: ignore[assignment]
    _MISSING = "it was not built" if isinstance(error, ModuleNotFoundError) else f"it does not load: {error}"


def compiled(device: str = "cpu") -> bool:
    """Whether the compiled kernels (the extension module `_raydetr`) serve a type of device; else it is `reference`."""
    if kernels is None:
        return False
    return device in ("cpu", "meta") or (device == "cuda" and bool(cuda_architectures()))


def cuda_architectures() -> str:
    """What the CUDA kernels were built for, as in TORCH_CUDA_ARCH_LIST; empty where there are none."""
    return "" if kernels is None else kernels.CUDA_ARCHITECTURES


def description() -> str:
    """What runs the operator here, for people."""
    if kernels is None:
        return f"plain torch, several times slower than the compiled kernels (`_raydetr`: {_MISSING})"
    cuda = f"CUDA for {kernels.CUDA_ARCHITECTURES}" if kernels.CUDA_ARCHITECTURES else "on CUDA plain torch"
    return f"compiled kernels: CPU ({kernels.CPU_KERNELS}), {cuda}"


@functools.cache
def _warn_once() -> None:
    warnings.warn(f"the attention operator: {description()}", stacklevel=4)


def ms_deform_attn(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Weighted sums of values sampled at a few points of every level.

    Args:
        value: `[B, S, M, D]`, the levels one after the other, each row by row; S is the sum of their H * W.
        spatial_shapes: L pairs (H, W) of ints.
        sampling_locations: `[B, Q, M, L, P, 2]`, (x, y) in 0..1 over the level's whole canvas, padding included; cells
            are centred at (i + 0.5) / size, values between them are bilinear and outside they are 0.
        attention_weights: `[B, Q, M, L, P]`.

    Returns:
        `[B, Q, M * D]`, head by head, of value's type.

    Raises:
        ValueError: the shapes do not fit together.
    """
    if torch.compiler.is_exporting():  # what is exported runs where the kernels are not, on batches of any size
        return reference.ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights)
    check_shapes(value, spatial_shapes, sampling_locations, attention_weights)
    if not compiled(value.device.type):
        _warn_once()
        return reference.ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights)
    return kernels.ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights)
