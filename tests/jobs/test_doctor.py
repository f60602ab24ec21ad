"""jobs/doctor.py: the operator is proved, and what is wrong or missing is said with its remedy."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from jobs.cli import app
from jobs.doctor import Finding, examine, prove, runs_on
from model import ops
from model.ops import reference

needs_compiled = pytest.mark.skipif(not ops.compiled(), reason="the operator is not compiled here")


def operator_findings() -> list[Finding]:
    return [finding for finding in examine() if "operator" in finding.what]


@needs_compiled
def test_the_compiled_operator_is_proved() -> None:
    kernels, proof = operator_findings()[:2]
    assert kernels.state == proof.state == "ok"
    assert ops.kernels is not None
    assert f"CPU ({ops.kernels.CPU_KERNELS})" in kernels.detail
    assert proof.what == "operator on cpu"
    for kind in ("float32", "bfloat16", "float16"):
        assert f" in {kind}" in proof.detail


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
    monkeypatch.setattr("model.ops.ms_deform_attn", operator)
    finding = prove("cpu")
    assert finding.state == "wrong"
    assert told in finding.detail
    assert "\n" not in finding.detail


@needs_compiled
def test_exit_code_1_where_a_kernel_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    monkeypatch.setattr("model.ops.ms_deform_attn", raise_error)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "wrong    operator on cpu" in result.stdout


@pytest.mark.parametrize(("programs", "advice"), [(True, "build them with"), (False, "install a C++ compiler")])
def test_without_kernels_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch, programs: bool, advice: str) -> None:
    monkeypatch.setattr("model.ops.kernels", None)
    monkeypatch.setattr("model.ops._MISSING", "it was not built", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if programs else None)
    (finding,) = operator_findings()
    assert finding.state == "note"
    assert "plain torch" in finding.detail
    assert f"it was not built); {advice}" in finding.detail


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


@needs_compiled
@pytest.mark.parametrize(("built", "state"), [("8.0;9.0", "ok"), ("8.0;8.6", "wrong")])
def test_kernels_for_another_card(monkeypatch: pytest.MonkeyPatch, built: str, state: str) -> None:
    monkeypatch.setattr("model.ops.kernels.CUDA_ARCHITECTURES", built)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr("jobs.doctor.prove", lambda device: Finding("ok", f"operator on {device}", "proved"))
    on_card = operator_findings()[-1]
    assert on_card.what == "operator on cuda:0"
    assert on_card.state == state
    assert state == "ok" or "TORCH_CUDA_ARCH_LIST=9.0" in on_card.detail
