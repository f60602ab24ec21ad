"""The proof of the compiled operator: on a small case it computes what plain torch does, and so do its gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.ops import operator, reference

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Largest error of the compiled operator that is right, over the largest value of the exact result."""


class Proof(NamedTuple):
    """What came of it."""

    holds: bool
    """Whether the operator may be trained with."""
    told: str
    """The errors or the failure, for people."""


def prove(device: str) -> Proof:
    """Run the operator and its gradients on a small case on `device`, and compare them with plain torch in fp64."""
    try:
        errors = {dtype: operator_error(device, dtype) for dtype in TOLERANCE}
    except RuntimeError as error:
        return Proof(False, f"it fails: {f'{error}'.splitlines()[0]}")
    told = ", ".join(f"{error:.1e} in {dtype}".replace("torch.", "") for dtype, error in errors.items())
    if all(errors[dtype] <= most for dtype, most in TOLERANCE.items()):
        return Proof(True, f"output and gradients agree with plain torch (largest relative error {told})")
    return Proof(False, f"it differs from plain torch (largest relative error {told}); do not train with it")


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a card runs kernels that were built for the architectures of a TORCH_CUDA_ARCH_LIST.

    A binary serves its own generation from its minor version on (with a suffix, as in 9.0a, that card alone), and PTX
    whatever is later. Of names, as in Hopper, that is left to the proof.
    """
    for architecture in architectures.replace(";", " ").split():
        number, _, ptx = architecture.partition("+")
        if not number[:1].isdigit():
            return True
        major, minor = map(int, number.rstrip("af").split("."))
        if capability == (major, minor):
            return True
        if not number[-1].isdigit():
            continue
        if (capability[0] == major and capability[1] > minor) or (ptx and capability > (major, minor)):
            return True
    return False


class _Case(NamedTuple):
    """Inputs of the operator in fp64, and the gradient of its output."""

    value: Tensor
    locations: Tensor
    weights: Tensor
    grad: Tensor


_SHAPES = [(6, 9), (3, 5), (1, 1)]


def _make_case() -> _Case:
    generator = torch.Generator().manual_seed(0)
    like: Any = {"generator": generator, "dtype": torch.float64}
    size = (2, 40, 2, len(_SHAPES), 4)
    sizes = torch.tensor([(w, h) for h, w in _SHAPES])[:, None]
    # Some points lie outside; none where the lower neighbour changes, which would change the gradient by rounding.
    cells = ((torch.rand(*size, 2, **like) * 1.4 - 0.2) * sizes).floor()
    fractions = torch.rand(*size, 2, **like) * 0.9 + 0.05
    return _Case(
        value=torch.randn(2, sum(h * w for h, w in _SHAPES), 2, 32, **like),
        locations=(cells + fractions - 0.5) / sizes,
        weights=torch.rand(size, **like),
        grad=torch.randn(2, 40, 64, **like),
    )


def _results(attend: Callable[..., Tensor], case: _Case, device: str) -> list[Tensor]:
    """Output and the three gradients, in fp64 on the host."""
    leaves = [tensor.to(device, copy=True).requires_grad_() for tensor in case[:3]]
    output = attend(leaves[0], _SHAPES, *leaves[1:])
    gradients = torch.autograd.grad(output, leaves, case.grad.to(device))
    return [tensor.detach().cpu().double() for tensor in (output, *gradients)]


def operator_error(device: str, dtype: torch.dtype) -> float:
    """Largest error of the operator's output and its three gradients, each over the largest value of plain torch's.

    NaN where the operator's result has one.
    """
    exact = _make_case()
    sampling = torch.promote_types(dtype, torch.float32)
    rounded = _Case(
        exact.value.to(dtype), exact.locations.to(sampling), exact.weights.to(sampling), exact.grad.to(dtype)
    )
    ours = _results(operator.ms_deform_attn, rounded, device)
    wanted = _results(reference.ms_deform_attn, _Case(*(tensor.double() for tensor in rounded)), "cpu")
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(ours, wanted, strict=True)]
    return float(torch.stack(errors).max())
