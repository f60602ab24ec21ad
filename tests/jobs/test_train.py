"""Training under Ray Train: the same numbers. tests/clusters/test_training.py kills its workers."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

import jobs.train
from jobs.cluster import connected
from jobs.train import is_no_better, train
from pipeline import checkpoint
from pipeline.config.sections import ClusterSection, Config
from pipeline.data.manifest import Manifest
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.run_folder import METRICS_FILE, RunFolder
from pipeline.train.loop import train as train_here
from pipeline.train.run import TrainJob
from tests.builders import make_varied_manifest
from tests.pipeline.train.runs import MODEL, SETTINGS, losses

STEPS = 30


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with connected(ClusterSection(workers=2, device="cpu")):
            yield


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_varied_manifest(tmp_path_factory.mktemp("data"), 20, max_samples=6)


def make_config(runs: Path, name: str = "ray", cluster: dict[str, object] | None = None, **settings: object) -> Config:
    sections = {
        "name": name,
        "runs": str(runs),
        "model": MODEL,
        "train": {**SETTINGS, "max_steps": STEPS, "checkpoint_epochs": 1.0, **settings},
        "cluster": {"workers": 2, "device": "cpu", "require_compiled": False, **(cluster or {})},
    }
    return Config.model_validate(sections)


@pytest.fixture(scope="module")
def trained(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, int]:
    """A run that nothing disturbed, its last checkpoint, and how often it called back."""
    calls: list[None] = []
    config = make_config(tmp_path_factory.mktemp("runs"))
    last = train(config, manifest, on_poll=lambda _: calls.append(None))
    return config, last, len(calls)


def test_ray_workers_train_like_one_process(
    trained: tuple[Config, Path, int], manifest: Manifest, world: World, tmp_path: Path
) -> None:
    config, last, calls = trained
    assert last == config.folder.checkpoints / f"checkpoint-{STEPS}"
    assert checkpoint.read_state(last).world_size == 2
    assert calls >= 1
    job = TrainJob(config.model_for(manifest.labels.num_classes), config.train, manifest.folder, RunFolder(tmp_path))
    train_here(job, world)
    assert losses(config.folder) == pytest.approx(losses(job.out), rel=1e-5)


def test_a_finished_run_is_not_trained_again(trained: tuple[Config, Path, int], manifest: Manifest) -> None:
    assert train(trained[0], manifest) == trained[1]


def test_a_run_that_is_no_better_ends(manifest: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(tmp_path, max_steps=100_000, patience=1, freeze_backbone="stem_and_layer1")
    for name, value in (("checkpoint-1", 0.5), ("checkpoint-2", 0.4)):
        write_json(config.folder.evaluation / name / METRICS_FILE, {"AP": value})
    last = train(config, manifest)
    assert 0 < checkpoint.read_state(last).step < 100_000
    assert train(config, manifest) == last
    assert caplog.text.count("for some that have learnt: set train.freeze_backbone: none") == 1


def test_a_trial_that_others_are_better_than_has_ended(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    write_json(config.folder.pruned, {})
    assert not is_no_better(config), "there is nothing to score"
    write_json(config.folder.checkpoints / "checkpoint-3" / "state.json", {})
    assert is_no_better(config)
    config.folder.pruned.unlink()
    assert not is_no_better(config)


def test_wrong_input_of_a_worker_is_told_to_the_driver(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("text")
    config = make_config(tmp_path, init={"weights": str(tmp_path / "text.safetensors")})
    with pytest.raises(UserError, match=r"train\.init: .*text\.safetensors: damaged"):
        train(config, manifest)


def test_the_compiled_operator_may_be_required(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.train.compiled", lambda device: False)
    with pytest.raises(UserError, match=rf"cluster\.require_compiled is true.* for cpu on {socket.gethostname()}"):
        train(make_config(tmp_path, cluster={"require_compiled": True}), manifest)


def lack_the_operator_on_rank_1(settings: dict[str, Any]) -> dict[str, str]:
    """A worker, of which the second is on a host where nothing was compiled."""
    if ray.train.get_context().get_world_rank() == 1:
        jobs.train.compiled = lambda device: False  # type: ignore[attr-defined]
        socket.gethostname = lambda: "host-b"
    return worker(settings)


worker = jobs.train._worker


def test_a_worker_without_the_compiled_operator_is_named(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.train.compiled", lambda device: True)
    monkeypatch.setattr("jobs.train._worker", lack_the_operator_on_rank_1)
    with pytest.raises(UserError, match=r"cluster\.require_compiled is true.* for cpu on host-b"):
        train(make_config(tmp_path, cluster={"require_compiled": True}), manifest)
