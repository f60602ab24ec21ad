"""model/ops/proof.py: a kernel that is wrong in any of its results is not proved."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.ops import compiled, reference
from model.ops.proof import prove, runs_on


def plain(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    return reference.ms_deform_attn(value, shapes, locations, weights)


class ScaledGradient(torch.autograd.Function):
    """The identity, with a gradient that is a thousandth too large."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * 1.001


def raise_error(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available\nand more")


@pytest.mark.skipif(not compiled(), reason="the operator is not compiled here")
def test_the_compiled_operator_is_proved() -> None:
    proof = prove("cpu")
    assert proof.holds
    for kind in ("float32", "bfloat16", "float16"):
        assert f" in {kind}" in proof.told


@pytest.mark.parametrize(
    ("operator", "told"),
    [
        pytest.param(lambda v, z, x, w: plain(v, z, x, w) * 1.001, "differs from plain torch", id="output"),
        pytest.param(lambda v, z, x, w: plain(ScaledGradient.apply(v), z, x, w), "1.0e-03 in float32", id="value"),
        pytest.param(lambda v, z, x, w: plain(v, z, ScaledGradient.apply(x), w), "1.0e-03 in", id="locations"),
        pytest.param(lambda v, z, x, w: plain(v, z, x, ScaledGradient.apply(w)), "1.0e-03 in", id="weights"),
        pytest.param(lambda v, z, x, w: plain(v, z, x.flip(-1), w), "differs", id="x and y"),
        pytest.param(lambda v, z, x, w: plain(v, z, x, w) * float("nan"), "nan in", id="nan"),
        pytest.param(raise_error, "it fails: no kernel image is available", id="error"),
    ],
)
def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch, operator: Callable[..., Tensor], told: str) -> None:
    monkeypatch.setattr("model.ops.operator.ms_deform_attn", operator)
    proof = prove("cpu")
    assert not proof.holds
    assert told in proof.told
    assert "\n" not in proof.told


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("8.0;9.0", (9, 0), True),
        ("8.0 9.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0;9.0", (10, 0), False),
        ("8.0;9.0+PTX", (12, 0), True),
        ("9.0+PTX", (8, 9), False),
        ("9.0a", (9, 0), True),
        ("10.0a+PTX", (10, 3), False),
        ("10.0;12.0", (10, 3), True),
        ("Hopper", (9, 0), True),
        ("", (9, 0), False),
    ],
)
def test_which_cards_kernels_run_on(architectures: str, capability: tuple[int, int], runs: bool) -> None:
    assert runs_on(architectures, capability) is runs
