"""The CUDA kernels on a CPU: `csrc/cuda` compiled for the host over the stand-ins in this folder.

It shows that their arithmetic, their indexing and their exchanges between lanes are right. What only a GPU shows is
left to the tests that need one: memory order, atomics, streams.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.ops.compiler import compiler

HERE = Path(__file__).parent
LARGEST_GRID = 4
"""Blocks along an axis: few, so that small inputs need several launches."""


def load(folder: Path) -> Any:
    """Compile into `folder` and register; the namespace `torch.ops.raydetr_emulated`."""
    home = Path(torch.__file__).parent
    library = folder / "raydetr_emulated.so"
    command = [str(compiler()), "-O1", "-std=c++17", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-DRAYDETR_MAX_GRID={LARGEST_GRID}"]
    command += [f"-I{HERE}", "-isystem", str(home / "include"), str(HERE / "operator.cpp")]
    command += [f"-L{home / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10", "-o", str(library)]
    subprocess.run(command, check=True, timeout=600)
    torch.ops.load_library(str(library))
    return torch.ops.raydetr_emulated


class _Emulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, flat: list[int], locations: Tensor, weights: Tensor) -> Tensor:
        ctx.flat = flat
        ctx.save_for_backward(value, locations, weights)
        output: Tensor = torch.ops.raydetr_emulated.ms_deform_attn(value, flat, locations, weights)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        value, locations, weights = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[index] for index in (0, 2, 3)]
        gradients = torch.ops.raydetr_emulated.ms_deform_attn_backward(
            grad_output, value, ctx.flat, locations, weights, *wanted, torch.are_deterministic_algorithms_enabled()
        )
        first, *others = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
        return first, None, *others


def ms_deform_attn(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """`model.ops.ms_deform_attn` by the emulated kernels, with gradients; needs `load` first."""
    flat = [size for shape in spatial_shapes for size in shape]
    output: Tensor = _Emulated.apply(value, flat, sampling_locations, attention_weights)  # type: ignore[no-untyped-call]
    return output
