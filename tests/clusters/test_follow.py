"""A run that one command trains and another follows: the scores and MLflow's points are those of one that does both."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.store import StorePath
from tests.clusters.test_interrupts import Started
from tests.end_to_end.test_pipeline import PROJECT, SMALL
from tests.servers import MlflowServer
from tests.stores import S3Server

WAIT_SECONDS = 600
STEPS = [60, 120, 180, 240, 300, 360]


def command(word: str, runs: object, folder: Path, **extra: object) -> list[str]:
    """Of a run that writes a checkpoint every 60th step."""
    settings = {
        **SMALL,
        "runs": runs,
        "name": "run",
        "dataset.root": folder / "shapes",
        "shards.out": folder / "shards",
    }
    settings |= {"train.epochs": 120, "train.checkpoint_epochs": 20, "train.log_steps": 1, "evaluate.curve": "false"}
    settings |= {"train.keep_checkpoints": "null", "cluster.workers": 1, **extra}
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "jobs", word, "-c", "jobs/configs/demo.yaml", *arguments]


def do(words: list[str]) -> str:
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def ended(started: Started) -> str:
    """What a command has written, once it has ended well."""
    out, told = started.process.communicate(timeout=WAIT_SECONDS)
    assert started.process.returncode == 0, told[-3000:]
    return out + told


def wait_for(seen: Callable[[], bool], *commands: Started) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not seen():
        assert time.monotonic() < end
        for each in commands:
            assert each.process.poll() is None, each.process.communicate()[1][-3000:]
        time.sleep(0.1)


def scores(read: Callable[[str], bytes]) -> dict[int, dict[str, Any]]:
    """The metrics of the checkpoints, by their step, without where they lay."""
    found = {step: json.loads(read(f"evaluate/checkpoint-{step}/metrics.json")) for step in STEPS}
    return {step: {**metrics, "checkpoint": None} for step, metrics in found.items()}


def points(uri: str, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """What the curves of a run's evaluation hold; an interrupted run has one more checkpoint."""
    client = MlflowClient(uri)
    names = [name for name in client.get_run(run_id).data.metrics if name.startswith(("val", "baseline"))]
    return {
        name: sorted(
            (point.step, point.value) for point in client.get_metric_history(run_id, name) if point.step in STEPS
        )
        for name in names
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is scored beside training, and where that came too late, at the end; with its dataset and shards."""
    folder = tmp_path_factory.mktemp("alone")
    for word in ("shard", "train", "evaluate"):
        do(command(word, folder / "runs", folder, **{"evaluate.curve": word == "evaluate"}))
    return folder


def run_id(file: bytes) -> str:
    return str(json.loads(file)["run_id"])


def test_a_run_on_a_disk(alone: Path, tmp_path: Path) -> None:
    """The follower is there first, both are interrupted and go on, and each checkpoint is scored by one of them."""
    runs = tmp_path / "runs"
    run = runs / "run"
    evaluate = [*command("evaluate", runs, alone), "--follow"]
    follower = Started(evaluate, f"follower-{tmp_path.name}")
    trainer = Started(command("train", runs, alone, **{"evaluate.beside": "false"}), f"trainer-{tmp_path.name}")
    wait_for(lambda: bool(list(run.glob("evaluate/checkpoint-*/metrics.json"))), follower, trainer)
    assert follower.end(signal.SIGINT)[0] == 130
    assert trainer.end(signal.SIGINT)[0] == 130
    assert not follower.left()
    assert not (run / "followed" / "lock").exists()
    second = Started(evaluate, f"follower-{tmp_path.name}")
    wait_for((run / "followed" / "lock").exists, second)
    refused = subprocess.run(evaluate, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 2
    assert "following the run run is running already on" in refused.stderr
    do(command("train", runs, alone))  # which scores beside training, too
    told = ended(second)
    assert "no command trains" in told
    assert "checkpoint-360  AP" in told
    assert scores(lambda name: (run / name).read_bytes()) == scores(
        lambda name: (alone / "runs" / "run" / name).read_bytes()
    )
    both = [
        points(f"sqlite:///{folder / 'mlflow.db'}", run_id((folder / "run" / "mlflow_run.json").read_bytes()))
        for folder in (runs, alone / "runs")
    ]
    assert both[0] == both[1]
    assert [step for step, _ in both[0]["val/AP"]] == STEPS
    assert [path.name for path in (run / "followed").rglob("*") if path.is_file()] == []
    assert json.loads((run / "evaluate" / "metrics.json").read_text())["verified"]


def test_a_run_in_a_store(
    s3: S3Server, s3_folder: StorePath, mlflow_server: MlflowServer, alone: Path, tmp_path: Path
) -> None:
    """The follower has another disk for its copies, as on another host."""
    runs = s3_folder / "runs"
    words = {"tracking.uri": mlflow_server.uri, "evaluate.beside": "false"}
    (tmp_path / "follower").mkdir()
    trainer = Started(command("train", runs, alone, **words), f"trainer-{tmp_path.name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", tempfile.gettempdir())  # its sockets want a short path
        patch.setenv("TMPDIR", str(tmp_path / "follower"))
        follower = Started([*command("evaluate", runs, alone, **words), "--follow"], f"follower-{tmp_path.name}")
    ended(trainer)
    ended(follower)
    run = runs / "run"
    assert scores(lambda name: (run / name).read_bytes()) == scores(
        lambda name: (alone / "runs" / "run" / name).read_bytes()
    )
    found = points(mlflow_server.uri, run_id((run / "mlflow_run.json").read_bytes()))
    file = alone / "runs" / "run" / "mlflow_run.json"
    assert found == points(f"sqlite:///{alone / 'runs' / 'mlflow.db'}", run_id(file.read_bytes()))
    assert [name for name in (run / "followed").list() if not name.endswith("lease.json")] == []
