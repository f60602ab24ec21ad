"""`raydetr runs`."""

import json
from pathlib import Path

from typer.testing import CliRunner

from jobs.cli import app
from jobs.runs import _age
from pipeline.run_folder import RunFolder
from pipeline.tracking.tracker import Tracker


def test_a_run_that_nobody_works_on_is_told(mlflow_uri: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "left-over")
    tracker = Tracker(mlflow_uri, "runs", "left-over", folder.mlflow_run)
    tracker.start()
    arguments = ["runs", "--tracking-uri", mlflow_uri]
    table = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    (line,) = [line for line in table.splitlines() if line.startswith("left-over")]
    assert "RUNNING, but no command works on it" in line
    tracker.finish()
    runs = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)
    (run,) = [run for run in runs if run["run_id"] == tracker.run_id]
    assert run["status"] == "FINISHED"


def test_ages() -> None:
    assert [_age(seconds) for seconds in (5, 90, 5400, 129600)] == ["5 s", "1.5 min", "1.5 h", "1.5 d"]
