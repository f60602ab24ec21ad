"""Registration as a transaction, cut and many at once. tests/clusters/test_mlflow.py cuts it at every request."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.sections import METRICS, EvaluateSection, RegisterSection
from pipeline.data.labels import Category, LabelMap
from pipeline.registry import package
from pipeline.registry.register import VERSION, Registration, register, register_version
from pipeline.tracking import tracker as tracking
from pipeline.tracking.tracker import Tracker
from tests.builders import write_checkpoint
from tests.servers import CuttingClient

LABELS = LabelMap("contiguous", (Category(3, "cat"), Category(90, "dog")))
SECTION = EvaluateSection(short_side=40, max_side=60, max_detections=5)
EXPERIMENT = "transactions"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.0)


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions without a network: what is asked of MLflow is the same, and takes no second."""

    def write(detector: Any, folder: Path, card: Any) -> None:
        folder.mkdir(parents=True)
        (folder / "MLmodel").write_text("flavors: {}\n")

    monkeypatch.setattr(package, "write_model", write)


def open_run(uri: str, run: Path) -> Tracker:
    handlers = {VERSION: register_version}
    return Tracker(uri, EXPERIMENT, run.name, run / "mlflow_run.json", handlers=handlers)


def make_version(tracker: Tracker, checkpoint: Path, name: str, value: float = 0.5) -> Registration | None:
    metrics = {metric: value for metric in METRICS} | {"per_category": {"cat": {"AP": value}}}
    return register(tracker, checkpoint, metrics, "val", RegisterSection(model_name=name), SECTION, {"name": "run"})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints"), LABELS)


def check(tracker: Tracker, name: str) -> None:
    """One version, whole, the champion; no logged model beside its own; nothing of the lock is left."""
    client = tracker.client
    (version,) = client.search_model_versions(f"name='{name}'")
    assert client.get_model_version_by_alias(name, "champion").version == version.version
    assert float(version.tags["raydetr.metric.AP"]) == 0.5
    assert version.tags["raydetr.champion"] != "undecided"
    model_id = version.source.removeprefix("models:/")
    experiment = client.get_experiment_by_name(EXPERIMENT)
    models = client.search_logged_models([experiment.experiment_id])
    models = [model for model in models if model.source_run_id == version.run_id]
    assert [(model.model_id, str(model.status)) for model in models] == [(model_id, "READY")]
    assert json.loads(models[0].tags["mlflow.modelVersions"]) in (
        [{"name": name, "version": str(version.version)}],
        [{"name": name, "version": int(version.version)}],
    )
    run = client.get_run(tracker.run_id)
    assert [output.model_id for output in run.outputs.model_outputs] == [model_id]
    assert run.data.metrics["AP"] == 0.5
    assert run.data.tags["raydetr.registered"] == f"models:/{name}/{version.version}"
    assert len(client.get_metric_history(tracker.run_id, "AP")) == 1
    assert not [model.name for model in client.search_registered_models() if model.name.startswith("raydetr.lock")]
    assert not list((tracker.outbox.folder / "checkpoints").iterdir())


@pytest.mark.usefixtures("light")
class TestCut:
    def test_then_the_checkpoint_is_gone(self, mlflow_uri: str, checkpoint: Path, tmp_path: Path) -> None:
        """Retention may delete it while the version waits."""
        own = tmp_path / "run" / "checkpoints" / "checkpoint-5"
        shutil.copytree(checkpoint, own)
        tracker = open_run(mlflow_uri, tmp_path / "run")
        tracker._client = CuttingClient(tracker.client, 1, is_done=False)
        assert make_version(tracker, own, "retention") is None
        shutil.rmtree(own)
        again = open_run(mlflow_uri, tmp_path / "run")
        again.settle(patience=0)
        check(again, "retention")

    def test_a_champion_that_was_moved_by_hand_stays(self, mlflow_uri: str, checkpoint: Path, tmp_path: Path) -> None:
        tracker = open_run(mlflow_uri, tmp_path)
        make_version(tracker, checkpoint, "by-hand", 0.4)
        make_version(tracker, checkpoint, "by-hand", 0.5)
        tracker.client.set_registered_model_alias("by-hand", "champion", "1")
        again = make_version(tracker, checkpoint, "by-hand", 0.5)
        assert again is not None
        assert (again.version, again.is_champion, again.is_new) == (2, False, False)


@pytest.mark.usefixtures("light")
class TestTwoRuns:
    def test_with_the_same_results_share_a_version_that_both_show(
        self, mlflow_uri: str, checkpoint: Path, tmp_path: Path
    ) -> None:
        first, second = (open_run(mlflow_uri, tmp_path / name) for name in ("first", "second"))
        make_version(first, checkpoint, "shared")
        shared = make_version(second, checkpoint, "shared")
        assert shared is not None
        assert (shared.version, shared.is_new) == (1, False)
        check(first, "shared")
        check(second, "shared")

    def test_one_that_was_cut_leaves_no_model_when_the_other_was_faster(
        self, mlflow_uri: str, checkpoint: Path, tmp_path: Path
    ) -> None:
        first, second = (open_run(mlflow_uri, tmp_path / name) for name in ("first", "second"))
        real = first.client
        client = CuttingClient(real, 10_000, is_done=True)
        first._client = client
        client.create_registered_model = lambda *_: (_ for _ in ()).throw(ConnectionResetError())
        assert make_version(first, checkpoint, "faster") is None
        make_version(second, checkpoint, "faster")
        first._client = real
        first.settle(patience=0)
        experiment = real.get_experiment_by_name(EXPERIMENT)
        own = [
            model
            for model in real.search_logged_models([experiment.experiment_id])
            if model.source_run_id == first.run_id
        ]
        assert own == []
        check(first, "faster")

    def test_at_once(self, mlflow_uri: str, tmp_path: Path) -> None:
        """Five results, and the best of them twice: the best is the champion, and one version."""
        values = [0.1, 0.9, 0.5, 0.9, 0.3]
        trackers = [open_run(mlflow_uri, tmp_path / f"run-{index}") for index in range(len(values))]
        sources = {
            value: write_checkpoint(tmp_path / str(value), LABELS, seed=round(value * 10)) for value in set(values)
        }
        made: list[Any] = [None] * len(values)

        def one(index: int) -> None:
            made[index] = make_version(trackers[index], sources[values[index]], "rush", values[index])
            if made[index] is None:
                trackers[index].settle(patience=120)

        threads = [threading.Thread(target=one, args=(index,)) for index in range(len(values))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        client = trackers[0].client
        versions = {float(each.tags["raydetr.metric.AP"]): each for each in client.search_model_versions("name='rush'")}
        assert sorted(versions) == [0.1, 0.3, 0.5, 0.9]
        assert len(client.search_model_versions("name='rush'")) == 4
        assert client.get_model_version_by_alias("rush", "champion").version == versions[0.9].version
