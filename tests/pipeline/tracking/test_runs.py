"""The runs of a server, and whether anybody works on them."""

import shutil
from pathlib import Path

from pipeline.files import held
from pipeline.run_folder import RunFolder
from pipeline.tracking.runs import list_runs
from pipeline.tracking.tracker import Tracker


def test_a_run_that_nobody_works_on(mlflow_uri: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "left")
    tracker = Tracker(mlflow_uri, "listed", "left", folder.mlflow_run)
    tracker.start()
    tracker.client.log_metric(tracker.run_id, "val/AP", 0.25)

    def listed() -> dict[str, object]:
        (run,) = [run for run in list_runs(tracker.client, 1000) if run["run_id"] == tracker.run_id]
        return run

    found = listed()
    assert (found["name"], found["status"], found["AP"], found["worked_on"]) == ("left", "RUNNING", 0.25, False)
    with held(folder.lock, "the run left"):
        assert listed()["worked_on"] is True
    assert not folder.lock.exists()
    shutil.rmtree(folder.path)
    assert listed()["worked_on"] is None


def test_only_so_many_and_only_ours(mlflow_uri: str, tmp_path: Path) -> None:
    tracker = Tracker(mlflow_uri, "listed", "newest", tmp_path / "mlflow_run.json")
    other = tracker.client.create_run(tracker.client.get_run(tracker.run_id).info.experiment_id, run_name="other")
    assert len(list_runs(tracker.client, 1)) == 1
    assert other.info.run_id not in [run["run_id"] for run in list_runs(tracker.client, 1000)]
