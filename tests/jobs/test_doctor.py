"""jobs/doctor.py: the operator is proved, and what is wrong or missing is said with its remedy."""

from pathlib import Path

import pytest
from torch import Tensor
from typer.testing import CliRunner

from jobs.cli import app
from jobs.doctor import Finding, examine, examine_config, merged, told_links
from jobs.nodes import Link, Silent
from model.ops.operator import compiled, kernels
from model.ops.proof import Proof
from pipeline.config.sections import Config

needs_compiled = pytest.mark.skipif(not compiled(), reason="the operator is not compiled here")


def operator_findings() -> list[Finding]:
    return [finding for finding in examine() if "operator" in finding.what]


@pytest.mark.parametrize(("gib", "state"), [(0, "ok"), (10**9, "note")])
def test_shared_memory_is_measured(gib: int, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.doctor.SHARED_GIB", gib)
    (finding,) = (finding for finding in examine() if finding.what == "shared memory")
    assert finding.state == state
    assert ("--shm-size" in finding.detail) == (state == "note")


@needs_compiled
def test_the_compiled_operator_is_proved() -> None:
    built, proof = operator_findings()[:2]
    assert built.state == proof.state == "ok"
    assert kernels is not None
    assert f"CPU ({kernels.CPU_KERNELS})" in built.detail
    assert proof.what == "operator on cpu"
    for kind in ("float32", "bfloat16", "float16"):
        assert f" in {kind}" in proof.detail


def raise_error(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available\nand more")


@needs_compiled
def test_exit_code_1_where_a_kernel_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    monkeypatch.setattr("model.ops.operator.ms_deform_attn", raise_error)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "wrong    operator on cpu" in result.stdout


@pytest.mark.parametrize(("programs", "advice"), [(True, "build them with"), (False, "install a C++ compiler")])
def test_without_kernels_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch, programs: bool, advice: str) -> None:
    monkeypatch.setattr("model.ops.operator.kernels", None)
    monkeypatch.setattr("model.ops.operator._MISSING", "it was not built", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if programs else None)
    (finding,) = operator_findings()
    assert finding.state == "note"
    assert "plain torch" in finding.detail
    assert f"it was not built); {advice}" in finding.detail


@needs_compiled
@pytest.mark.parametrize(("built", "state"), [("8.0;9.0", "ok"), ("8.0;8.6", "wrong")])
def test_kernels_for_another_card(monkeypatch: pytest.MonkeyPatch, built: str, state: str) -> None:
    monkeypatch.setattr("model.ops.operator.kernels.CUDA_ARCHITECTURES", built)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr("jobs.doctor.prove", lambda device: Proof(True, "proved"))
    on_card = operator_findings()[-1]
    assert on_card.what == "operator on cuda:0"
    assert on_card.state == state
    assert state == "ok" or "TORCH_CUDA_ARCH_LIST=9.0" in on_card.detail


def findings(torch: str = "2.13.0", disk: str = "9 GiB") -> list[Finding]:
    return [Finding("ok", "torch", torch), Finding("ok", "disk", disk)]


def test_what_nodes_say_alike_is_one_line() -> None:
    assert merged({"a": findings(), "b": findings(), "c": findings(disk="7 GiB")}) == [
        Finding("ok", "torch", "2.13.0", "all 3 nodes"),
        Finding("ok", "disk", "9 GiB", "a, b"),
        Finding("ok", "disk", "7 GiB", "c"),
    ]


def test_versions_that_differ_are_wrong() -> None:
    usual, other = (
        line for line in merged({"a": findings("2.12.1"), "b": findings(), "c": findings()}) if line.what == "torch"
    )
    assert (other, usual.nodes) == (Finding("ok", "torch", "2.13.0", "b, c"), "a")
    assert usual.failed
    assert usual.detail.startswith("2.12.1, not 2.13.0 as elsewhere: install")


def test_a_node_that_says_nothing() -> None:
    *_, wrong = merged({"a": findings(), "b": Silent("it has not answered for 60 s")})
    assert (wrong.state, wrong.nodes) == ("wrong", "b")


def test_links_that_are_slow_or_cut() -> None:
    fast, slow = Link(1e-4, 1.2e9), Link(1e-4, 1.2e8)
    states = [f.state for f in told_links({("a", "b"): fast, ("b", "c"): slow, ("c", "a"): fast})]
    assert states == ["ok", "note", "ok"]
    (cut,) = told_links({("a", "b"): Silent("No route to host")})
    assert (cut.state, cut.nodes) == ("wrong", "a -> b")
    assert "No route to host; open the ports" in cut.detail


def test_the_places_of_a_pipeline(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    config = Config.model_validate(
        {
            "name": "run",
            "runs": str(tmp_path),
            "dataset": {"root": str(tmp_path / "data")},
            "tracking": {"uri": "http://127.0.0.1:1"},
        }
    )
    found = {finding.what: finding for finding in examine_config(config)}
    assert found["dataset.root"].state == "ok"
    assert found["shards.out"].state == "note"
    assert found["tracking.uri"].state == "missing"
    assert "http://127.0.0.1:1: is away; training goes on without it" in found["tracking.uri"].detail


def test_a_database_is_not_made_by_looking(tmp_path: Path) -> None:
    config = Config.model_validate(
        {"name": "run", "runs": str(tmp_path), "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"}}
    )
    assert examine_config(config)[-1].detail.endswith("is made by the first run")
    assert not (tmp_path / "mlflow.db").exists()
