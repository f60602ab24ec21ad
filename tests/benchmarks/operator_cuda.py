"""The CUDA attention operator on a GPU: builds it if need be, checks it, and prints how long it takes.

    python tests/benchmarks/operator_cuda.py [--repeats 50] [--keep-l2]

Encoder: the tokens of an 800 x 1333 image as queries, 8 heads, 32 channels, 4 levels, 4 points. Offsets as at the start
of training (one direction a head, 1 to 4 cells), with a sigma of 3 cells, and anywhere. Beside ours: plain torch
(`model.ops.reference`), and the operators of others as far as their modules can be imported: the original's
(MultiScaleDeformableAttention), DCNv4's and msda-triton's. "of limit" is the time that memory traffic alone would take
over the time taken, "off by" the largest error of the output over its largest value, but for the 0.1 % worst places;
the L2 cache is emptied before every call unless --keep-l2. Without a GPU it says so and passes.
"""

import argparse
import importlib
import itertools
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import SHAPES, centres
from torch import Tensor

from model import ops
from model.ops import reference

PROJECT = Path(__file__).resolve().parents[2]
FLAT = [size for shape in SHAPES for size in shape]
CELLS = sum(height * width for height, width in SHAPES)
HEADS, CHANNELS, POINTS = 8, 32, 4
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCE = {"bf16": 1e-2, "fp16": 1e-2, "fp32": 1e-4}
BANDWIDTH = 4.3e12
"""Bytes a second, measured on an H200; the limit is meant for that card."""


class Case(NamedTuple):
    """Inputs of one call; locations and weights in fp32."""

    value: Tensor
    locations: Tensor
    weights: Tensor
    grad: Tensor


Step = Callable[[], Any]
Maker = Callable[[Case], tuple[Step, Step]]
"""Makes the forward and the backward of a case."""


def make_case(kind: str, batch: int, dtype: torch.dtype) -> Case:
    """Random inputs whose points lie as `kind` says."""
    generator = torch.Generator("cuda").manual_seed(0)
    random = {"generator": generator, "device": "cuda"}
    size = (batch, CELLS, HEADS, len(SHAPES), POINTS)
    own = centres().cuda()[:, None, None, None]
    cells = torch.tensor([(width, height) for height, width in SHAPES], device="cuda")[:, None]
    if kind == "uniform":
        locations = torch.rand(*size, 2, **random)
    elif kind == "sigma 3":
        locations = own + 3 * torch.randn(*size, 2, **random) / cells
    else:
        angles = torch.arange(HEADS, device="cuda") * (2 * math.pi / HEADS)
        directions = torch.stack((angles.cos(), angles.sin()), -1)
        directions = (directions / directions.abs().amax(-1, keepdim=True))[:, None, None]
        steps = torch.arange(1, POINTS + 1, device="cuda")[:, None]
        # A little noise: exactly whole steps would meet the borders of cells, where the gradient jumps.
        locations = own + (directions * steps + 0.1 * torch.randn(*size, 2, **random)) / cells
    return Case(
        torch.randn(batch, CELLS, HEADS, CHANNELS, **random).to(dtype),
        locations,
        torch.rand(size, **random).flatten(-2).softmax(-1).view(size),
        torch.randn(batch, CELLS, HEADS * CHANNELS, **random).to(dtype),
    )


def make_ours(deterministic: bool) -> Maker:
    """The operators as they are registered: no time of autograd."""

    def make(case: Case) -> tuple[Step, Step]:
        tensors = (case.value, FLAT, case.locations, case.weights)
        return (
            lambda: torch.ops.raydetr.ms_deform_attn(*tensors),
            lambda: torch.ops.raydetr.ms_deform_attn_backward(case.grad, *tensors, True, True, True, deterministic),
        )

    return make


def with_autograd(operator: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> tuple[Step, Step]:
    """Forward and backward of an operator that knows its gradient, from inputs as it takes them."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    kept: list[Tensor] = []

    def forward() -> Tensor:
        with torch.no_grad():
            return operator(*leaves)

    def backward() -> None:
        if not kept:
            kept.append(operator(*leaves))
        torch.autograd.grad(kept[0], leaves, grad, retain_graph=True)

    return forward, backward


def make_plain(case: Case) -> tuple[Step, Step]:
    """The reference."""
    return with_autograd(
        lambda value, locations, weights: reference.ms_deform_attn(value, SHAPES, locations, weights),
        (case.value, case.locations, case.weights),
        case.grad,
    )


def shapes_and_starts() -> tuple[Tensor, Tensor]:
    """What the others take: shapes [L, 2] and the first row of every level, on the GPU."""
    shapes = torch.tensor(SHAPES, device="cuda")
    return shapes, torch.cat((shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]))


def make_original(case: Case) -> tuple[Step, Step]:
    """fundamentalvision/Deformable-DETR, models/ops: fp32 only."""
    module = importlib.import_module("MultiScaleDeformableAttention")
    if case.value.dtype != torch.float32:
        raise NotImplementedError("fp32 only")
    tensors = (case.value, *shapes_and_starts(), case.locations, case.weights)
    return (
        lambda: module.ms_deform_attn_forward(*tensors, 64),
        lambda: module.ms_deform_attn_backward(*tensors, case.grad, 64),
    )


def make_dcnv4(case: Case) -> tuple[Step, Step]:
    """OpenGVLab/DCNv4, DCNv4_op: locations and the softmax's inputs come in one tensor of value's type."""
    function = importlib.import_module("DCNv4.functions").FlashDeformAttnFunction
    shapes, starts = shapes_and_starts()
    packed = torch.cat((case.locations.flatten(3), case.weights.log().flatten(3)), -1).to(case.value.dtype)
    return with_autograd(
        lambda value, packed: function.apply(value, shapes, starts, packed, 64, POINTS),
        (case.value, packed),
        case.grad,
    )


def make_triton(case: Case) -> tuple[Step, Step]:
    """rziga/msda-triton. Its public function goes on in plain torch without a word where its kernels fail."""
    function = importlib.import_module("msda_triton.frontend").triton_multiscale_deformable_attention
    shapes, _ = shapes_and_starts()
    dtype = case.value.dtype
    return with_autograd(
        lambda value, locations, weights: function(value, shapes, locations, weights, "zeros", False).flatten(2),
        (case.value, case.locations.to(dtype), case.weights.to(dtype)),
        case.grad,
    )


IMPLEMENTATIONS: dict[str, Maker] = {
    "ours": make_ours(deterministic=False),
    "ours, deterministic": make_ours(deterministic=True),
    "plain torch": make_plain,
    "the original": make_original,
    "DCNv4": make_dcnv4,
    "msda-triton": make_triton,
}


def microseconds(step: Step, repeats: int, flush: Tensor | None) -> float:
    """Median time of a call on the GPU."""
    for _ in range(3):
        step()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in events:
        if flush is not None:
            flush.zero_()
        start.record()
        step()
        stop.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(start.elapsed_time(stop) for start, stop in events)


def limits(case: Case) -> tuple[float, float]:
    """Microseconds of the forward and the backward if every byte passed once through the DRAM of an H200."""
    value, sampling = case.value.nbytes, case.locations.nbytes + case.weights.nbytes
    forward = value + case.grad.nbytes + sampling
    return 1e6 * forward / BANDWIDTH, 1e6 * (forward + value + sampling) / BANDWIDTH


def error_of(got: Tensor, exact: Tensor) -> float:
    """Largest error over the largest exact value, but for the 0.1 % worst places.

    A few locations lie so near a border of cells that fp32 takes the other side.
    """
    error = (got.double() - exact).abs().flatten()
    return float(error.kthvalue(max(1, int(0.999 * error.numel()))).values / exact.abs().max())


def check(batch: int = 2) -> list[str]:
    """What of ours is wrong: output and gradients against plain torch in fp64, at random places."""
    wrong = []
    for (name, dtype), deterministic in itertools.product(DTYPES.items(), (False, True)):
        case = make_case("sigma 3", batch, dtype)
        forward, backward = make_ours(deterministic)(case)
        ours: list[Any] = [forward(), *backward()]
        leaves = [tensor.double().requires_grad_() for tensor in case[:3]]
        output = reference.ms_deform_attn(leaves[0], SHAPES, leaves[1], leaves[2])
        exact = [output, *torch.autograd.grad(output, leaves, case.grad.double())]
        for what, got, wanted in zip(("output", "value", "locations", "weights"), ours, exact, strict=True):
            error = error_of(got, wanted)
            if not error <= TOLERANCE[name]:
                wrong.append(f"{name}{', deterministic' * deterministic}: {what} is off by {error:.1e}")
    return wrong


def build() -> None:
    """Compile the extension into the project's folder for the card that is here, and start again."""
    if os.environ.get("RAYDETR_BENCHMARK_BUILT"):
        raise SystemExit("the extension was built without CUDA kernels; see `raydetr doctor`")
    major, minor = torch.cuda.get_device_capability()
    environment = {**os.environ, "RAYDETR_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    subprocess.run(command, cwd=PROJECT, env=environment, check=True)
    path = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
    os.execve(
        sys.executable,
        [sys.executable, *sys.argv],
        {**os.environ, "RAYDETR_BENCHMARK_BUILT": "1", "PYTHONPATH": path},
    )


def row_of(case: Case, maker: Maker, repeats: int, flush: Tensor | None) -> str:
    """Times of one operator, or what it says to a case that it does not take."""
    steps = maker(case)
    with torch.no_grad():
        exact = reference.ms_deform_attn(case.value.double(), SHAPES, case.locations.double(), case.weights.double())
    cells = []
    for step, limit in zip(steps, limits(case), strict=True):
        try:
            time = microseconds(step, repeats, flush)
            cells.append(f"{time:11.1f} {limit / time:8.0%}")
        except RuntimeError as error:
            cells.append(str(error).splitlines()[0][:20].rjust(20))
    return f"{' '.join(cells)} {error_of(steps[0](), exact):9.1e}"


def measure(options: argparse.Namespace) -> None:
    """Print the table: ours first, since an operator that reads where it must not takes the GPU from all after it."""
    flush = None if options.keep_l2 else torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    print(f"{'operator':20} {'points':8} {'batch':>5} {'type':5} {'forward us':>11} {'of limit':>8} "
          f"{'backward us':>11} {'of limit':>8} {'off by':>9}")  # fmt: skip
    for (title, maker), kind, batch, (name, dtype) in itertools.product(
        IMPLEMENTATIONS.items(), ("initial", "sigma 3", "uniform"), options.batches, DTYPES.items()
    ):
        try:
            row = row_of(make_case(kind, batch, dtype), maker, options.repeats, flush)
        except ModuleNotFoundError:
            row = f"{'not installed':>20}"
        except Exception as error:
            if title.startswith("ours"):
                raise
            row = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
        print(f"{title:20} {kind:8} {batch:5} {name:5} {row}", flush=True)


def main() -> int:
    """The exit code is 1 if ours is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--keep-l2", action="store_true", help="do not empty the L2 cache before every call")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("operator_cuda: no GPU is usable here, nothing is measured")
        return 0
    if not ops.compiled("cuda"):
        build()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {ops.description()}")
    wrong = check()
    print(*(f"WRONG {line}" for line in wrong), sep="\n", end="\n" if wrong else "")
    measure(options)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
