"""How many times faster the compiled attention operator is than plain torch (`model.ops.reference`), both in one run.

    python tests/benchmarks/operator.py [--threads 2] [--repeats 5]

Encoder: the tokens of an 800 x 1333 image as queries; decoder: 300 queries. 8 heads, 32 channels, 4 levels, 4 points,
fp32. "local" locations lie around the query's own position with a sigma of 3 cells, "uniform" ones anywhere. The two
take turns; those of the decoder, milliseconds long, are of ten calls in a row.
"""

import argparse
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from common import SHAPES, centres, seconds
from torch import Tensor

from model.ops import ms_deform_attn, reference

HEADS, CHANNELS, POINTS = 8, 32, 4


class Case(NamedTuple):
    """Inputs of the operator and the least ratios, of the forward alone and of forward and backward."""

    name: str
    value: Tensor
    locations: Tensor
    weights: Tensor
    least: tuple[float, float]


def make_case(name: str, batch: int, queries: int | None, local: bool, least: tuple[float, float]) -> Case:
    """Random inputs; all tokens are queries when `queries` is None."""
    generator = torch.Generator().manual_seed(0)
    cells = sum(h * w for h, w in SHAPES)
    count = cells if queries is None else queries
    size = (batch, count, HEADS, len(SHAPES), POINTS)
    value = torch.randn(batch, cells, HEADS, CHANNELS, generator=generator)
    weights = torch.rand(size, generator=generator).flatten(-2).softmax(-1).view(size)
    if local:
        own = centres() if queries is None else torch.rand(count, 2, generator=generator)
        offsets = 3 * torch.randn(*size, 2, generator=generator)
        sizes = torch.tensor([(w, h) for h, w in SHAPES], dtype=torch.float32)
        locations = own[:, None, None, None] + offsets / sizes[:, None]
    else:
        locations = torch.rand(*size, 2, generator=generator)
    return Case(name, value, locations, weights, least)


def forward(operator: Callable[..., Tensor], case: Case) -> None:
    """Inference."""
    with torch.inference_mode():
        operator(case.value, SHAPES, case.locations, case.weights)


def forward_and_backward(operator: Callable[..., Tensor], case: Case) -> None:
    """One step of training: all three gradients."""
    inputs = [tensor.detach().requires_grad_() for tensor in (case.value, case.locations, case.weights)]
    output = operator(inputs[0], SHAPES, inputs[1], inputs[2])
    torch.autograd.grad(output, inputs, torch.ones_like(output))


def main() -> int:
    """Print the table; the exit code is 1 if a ratio is below its least."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = [
        make_case("encoder local, batch 1", 1, None, True, (20, 12)),
        make_case("encoder local, batch 2", 2, None, True, (20, 12)),
        make_case("encoder uniform, batch 1", 1, None, False, (8, 5)),
        make_case("encoder uniform, batch 2", 2, None, False, (8, 5)),
        make_case("decoder local, batch 1", 1, 300, True, (20, 10)),
        make_case("decoder local, batch 2", 2, 300, True, (20, 10)),
    ]
    print(f"{'case':26} {'what':18} {'plain ms':>9} {'compiled ms':>12} {'ratio':>7} {'least':>6}")
    missed = 0
    for case in cases:
        for index, what in enumerate(("forward", "forward + backward")):
            operators = (reference.ms_deform_attn, ms_deform_attn)
            step = forward if index == 0 else forward_and_backward
            in_a_row = 10 if case.locations.shape[1] < 1000 else 1
            calls = [functools.partial(step, operator, case) for operator in operators]
            times = seconds(calls, options.repeats, in_a_row)
            ratio = times[0] / times[1]
            missed += ratio < case.least[index]
            print(
                f"{case.name:26} {what:18} {times[0] * 1e3:9.1f} {times[1] * 1e3:12.2f} {ratio:7.1f} "
                f"{case.least[index]:6g}",
                flush=True,
            )
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
