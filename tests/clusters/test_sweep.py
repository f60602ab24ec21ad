"""Sweeps that are killed or ended half way: what the same command comes to, and what it does not do again."""

import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.clusters.test_interrupts import END_SECONDS, Started
from tests.end_to_end.test_pipeline import PROJECT, SMALL

OVER = ("train.lr=1e-3,1e-5", "train.weight_decay=1e-4,1e-2,1e-1")
TRIALS = 6
SCHEDULE = {
    "train.epochs": 240,
    "train.checkpoint_epochs": 40,
    "train.lr_drop_epochs": "[200]",
    "register.metric": "AR100",  # as few steps give no AP
}


def command(folder: Path, *over: str) -> list[str]:
    settings = {**SMALL, **SCHEDULE, "runs": folder / "runs", "dataset.root": folder / "shapes"}
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    arguments += [part for each in over for part in ("--over", each)]
    return [sys.executable, "-m", "jobs", "sweep", "-c", "jobs/configs/demo.yaml", "--search", "asha", *arguments]


def ask(folder: Path, question: str) -> list[Any]:
    with sqlite3.connect(folder / "runs" / "mlflow.db") as database:
        return database.execute(question).fetchall()


def statuses(folder: Path) -> set[tuple[str, str]]:
    return set(ask(folder, "select name, status from runs"))


def times(*folders: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}


def test_a_killed_sweep_goes_on_and_does_no_trial_twice(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    records = [runs / "demo-sweep" / "trials" / f"{number}.json" for number in range(1, TRIALS + 1)]
    trials = [runs / f"demo-sweep-{number}" for number in range(1, TRIALS + 1)]
    started = Started(command(tmp_path, *OVER), "sweep")
    while not (records[1].exists() and list((trials[2] / "checkpoints").glob("checkpoint-*/state.json"))):
        assert started.process.poll() is None, started.process.communicate()
        time.sleep(0.1)
    started.process.send_signal(signal.SIGKILL)
    started.process.communicate(timeout=60)
    end = time.monotonic() + 60
    while started.left():
        assert time.monotonic() < end, started.left()
        time.sleep(0.5)
    assert [record.exists() for record in records] == [True, True, False, False, False, False]
    before = times(*(trial / "checkpoints" for trial in trials[:3]), records[0], records[1])

    again = subprocess.run(
        command(tmp_path, *OVER), cwd=PROJECT, capture_output=True, text=True, timeout=900, check=False
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "sweep: already done, 2 of 6 trials" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "starting 2 workers, going on from" in (runs / "demo-sweep" / "trials" / "3.log").read_text()
    found = [json.loads(record.read_text()) for record in records]
    assert {each["state"] for each in found} == {"done", "stopped early"}
    table = [line.split() for line in again.stdout.splitlines() if line.startswith("demo-sweep-")]
    scores = [float(line[3]) for line in table]
    assert sorted(line[0] for line in table) == [trial.name for trial in trials]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == round(max(each["metrics"]["AR100"] for each in found), 4)

    ((parent,),) = ask(tmp_path, "select run_uuid from runs where name = 'demo-sweep'")
    assert ask(tmp_path, "select count(*), max(status), min(status) from runs") == [(7, "FINISHED", "FINISHED")]
    assert ask(tmp_path, "select value, count(*) from tags where key = 'mlflow.parentRunId'") == [(parent, TRIALS)]
    points = ask(tmp_path, "select run_uuid, step from metrics where key = 'train/loss'")
    assert len(points) == len(set(points))
    versions = ask(tmp_path, "select runs.name from model_versions join runs on runs.run_uuid = model_versions.run_id")
    assert versions == [(table[0][0],)]
    (artifacts,) = (runs / "mlartifacts" / "raydetr" / parent).glob("artifacts")
    assert {"trials.csv", "parallel.png", "best.yaml"} <= {path.name for path in artifacts.iterdir()}

    best = [sys.executable, "-m", "jobs", "config", "-c", str(runs / "demo-sweep" / "best.yaml")]
    assert (
        f"name: {table[0][0]}\n" in subprocess.run(best, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    )
    other = command(tmp_path, OVER[0], "train.weight_decay=1e-4")
    refused = subprocess.run(other, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "over.train.weight_decay: 1e-4,1e-2,1e-1 -> 1e-4" in refused.stderr


def test_a_sweep_ends_in_order(tmp_path: Path) -> None:
    trials = [tmp_path / "runs" / f"demo-sweep-{number}" for number in (1, 2)]
    words = [*command(tmp_path, OVER[0]), "--at-once", "2", "--set", "cluster.workers=1"]
    started = Started(words, "ended")
    while not all(list((trial / "checkpoints").glob("checkpoint-*/state.json")) for trial in trials):
        assert started.process.poll() is None, started.process.communicate()
        time.sleep(0.1)
    code, took, told = started.end(signal.SIGTERM)
    assert code == 143, told
    assert took < END_SECONDS
    assert started.left() == []
    assert statuses(tmp_path) == {(name, "KILLED") for name in ("demo-sweep", "demo-sweep-1", "demo-sweep-2")}
