"""Commands that are ended from outside, at moments all over a run: what is left behind, and what the run comes to."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.end_to_end.test_pipeline import PROJECT, SMALL

MOMENTS = 10
END_SECONDS = 10


def command(folder: Path, name: str, **extra: object) -> list[str]:
    settings = {**SMALL, "runs": folder / "runs", "dataset.root": folder / "shapes", "name": name, **extra}
    settings |= {"train.epochs": 20, "train.checkpoint_epochs": 5, "train.log_steps": 5}
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "jobs", "run", "-c", "jobs/configs/demo.yaml", *arguments]


class Started:
    """A command that runs; all of its processes are told by a variable of their environment."""

    def __init__(self, words: list[str], mark: str) -> None:
        self.mark = mark
        environment = {**os.environ, "RAYDETR_TEST_MARK": mark}
        self.process = subprocess.Popen(
            words, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def end(self, number: signal.Signals) -> tuple[int, float, str]:
        """Exit code, seconds until it ended, and the last line that it wrote to stderr."""
        self.process.send_signal(number)
        begin = time.monotonic()
        _, errors = self.process.communicate(timeout=120)
        lines = errors.strip().splitlines()
        return self.process.returncode, time.monotonic() - begin, lines[-1] if lines else ""

    def left(self) -> list[str]:
        """Command lines of its processes that are still there."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("RAYDETR_TEST_MARK") == self.mark:
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return found


def weights(folder: Path, name: str) -> bytes:
    (last,) = [path for path in (folder / "runs" / name / "checkpoints").iterdir() if path.name == "checkpoint-60"]
    assert json.loads((last / "state.json").read_text())["step"] == 60
    return (last / "model.safetensors").read_bytes()


def statuses(folder: Path) -> dict[str, str]:
    """Status of the MLflow run of each name."""
    with sqlite3.connect(folder / "runs" / "mlflow.db") as database:
        return dict(database.execute("select name, status from runs"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A folder with a run that nothing disturbed, and the seconds that another run on its shards takes."""
    folder = tmp_path_factory.mktemp("interrupts")
    subprocess.run(command(folder, "unbroken"), cwd=PROJECT, check=True, capture_output=True, timeout=300)
    begin = time.monotonic()
    subprocess.run(command(folder, "second"), cwd=PROJECT, check=True, capture_output=True, timeout=300)
    assert weights(folder, "second") == weights(folder, "unbroken")
    return folder, time.monotonic() - begin


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_run_ends_in_order_at_any_moment_and_goes_on(moment: int, unbroken: tuple[Path, float]) -> None:
    folder, seconds = unbroken
    name, number = f"broken-{moment}", (signal.SIGINT, signal.SIGTERM)[moment % 2]
    started = Started(command(folder, name), name)
    time.sleep(seconds * (moment + 0.5) / MOMENTS)
    if started.process.poll() is None:
        code, took, told = started.end(number)
        assert took < END_SECONDS
        assert started.left() == []
        if code == 0:  # its work was over
            assert statuses(folder)[name] == "FINISHED"
            return
        assert (code, told.split(";")[0].split(".")[0]) == (128 + number, f"interrupted ({number.name})")
        assert statuses(folder).get(name) in (None, "KILLED")
    subprocess.run(command(folder, name), cwd=PROJECT, check=True, capture_output=True, timeout=300)
    assert weights(folder, name) == weights(folder, "unbroken")
    assert statuses(folder)[name] == "FINISHED"


def test_sharding_ends_in_order_and_goes_on(unbroken: tuple[Path, float], tmp_path: Path) -> None:
    folder, _ = unbroken
    more: dict[str, Any] = {"shards.out": tmp_path, "shards.max_samples": 1}
    started = Started(command(folder, "sharding", **more), "sharding")
    while not list(tmp_path.rglob("*.tar")):
        assert started.process.poll() is None
        time.sleep(0.01)
    code, took, _ = started.end(signal.SIGTERM)
    assert code == 143
    assert took < END_SECONDS
    assert started.left() == []


@pytest.mark.parametrize("killed", [("gcs_server", "raylet"), ("raylet",)], ids=["all of it", "its node"])
def test_ray_is_killed(killed: tuple[str, ...], unbroken: tuple[Path, float]) -> None:
    folder, _ = unbroken
    name = f"lost-{len(killed)}"
    started = Started(command(folder, name), name)
    while not (folder / "runs" / name / "spool" / "train.jsonl").exists():
        assert started.process.poll() is None
        time.sleep(0.1)
    for process in psutil.Process(started.process.pid).children(recursive=True):
        if process.name() in killed:
            process.kill()
    _, errors = started.process.communicate(timeout=60)
    assert started.process.returncode == 1
    assert errors.strip().splitlines()[-1].startswith("error: Ray has ended")
    assert started.left() == []
    assert statuses(folder)[name] == "FAILED"
    subprocess.run(command(folder, name), cwd=PROJECT, check=True, capture_output=True, timeout=300)
    assert weights(folder, name) == weights(folder, "unbroken")


def test_of_ten_commands_of_one_name_one_runs(unbroken: tuple[Path, float]) -> None:
    folder, _ = unbroken
    running = [Started(command(folder, "ten"), f"ten-{index}") for index in range(10)]
    ended = [(started.process.communicate(timeout=300)[1], started.process.returncode) for started in running]
    assert sorted(code for _, code in ended) == [0] + [2] * 9
    refused = [errors for errors, code in ended if code == 2]
    assert all("error: the run ten is running already on " in errors for errors in refused)
    assert weights(folder, "ten") == weights(folder, "unbroken")
