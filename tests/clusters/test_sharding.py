"""`raydetr shard` whose processes are killed in the middle: what the same command comes to, and what it does again."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.builders import make_annotation, write_coco
from tests.clusters.test_interrupts import Started
from tests.end_to_end.test_pipeline import PROJECT

IMAGES = 400
SHARDS = IMAGES // 2
WAIT_SECONDS = 120


def command(data: Path, out: Path, workers: int) -> list[str]:
    settings = {
        "name": "sharding",
        "runs": out / "runs",
        "dataset.root": data,
        "dataset.synthetic": "null",
        "dataset.train": "{annotations: annotations/train.json, images: train}",
        "dataset.val": "{annotations: annotations/val.json, images: val}",
        "shards.out": out,
        "shards.max_samples": 2,
        "shards.workers": workers,
        "cluster.workers": 1,
    }
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "jobs", "shard", "-c", "jobs/configs/demo.yaml", *arguments]


def run(words: list[str]) -> None:
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def sums(out: Path) -> dict[str, str]:
    """The sha256 of every file of the shards, of which none is hidden but the locks."""
    files = [path for path in out.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def recorded(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of the tars whose shards are finished, while the folder is not."""
    found = {}
    for record in (out / ".train.partial").glob("shard-*.json"):
        status = record.with_suffix(".tar").stat()
        found[record.with_suffix(".tar").name] = status.st_ino, status.st_mtime_ns
    return found


def wait_for(what: Callable[[], bool], started: Started) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not what():
        assert started.process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)


def kill(started: Started, is_meant: Callable[[psutil.Process], bool]) -> int:
    """Kills those of a command's processes that are meant; how many."""
    killed = 0
    for process in psutil.Process(started.process.pid).children(recursive=True):
        try:
            if is_meant(process):
                process.kill()
                killed += 1
        except psutil.NoSuchProcess:
            continue
    return killed


def is_task(process: psutil.Process) -> bool:
    """Whether it is at a task of `run_tasks`; Ray's agents, with which a raylet ends, have names much alike."""
    return process.name().startswith("ray::one")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_coco(root, range(1, IMAGES + 1), [make_annotation(number, number) for number in range(1, IMAGES + 1)])
    write_coco(root, [1001, 1002], split="val")
    return root


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("unbroken")
    run(command(data, out, 2))
    found = sums(out)
    assert sum(name.endswith(".tar") for name in found) == SHARDS + 1
    return found


def start_to_the_middle(data: Path, out: Path, workers: int) -> Started:
    started = Started(command(data, out, workers), f"sharding-{out.name}")
    wait_for(lambda: len(list((out / ".train.partial").glob("shard-*.json"))) >= SHARDS // 10, started)
    return started


def goes_on(data: Path, out: Path, workers: int, unbroken: dict[str, str]) -> None:
    """The same command finishes what was left, and nothing that was finished is done again."""
    done = recorded(out)
    assert SHARDS // 10 <= len(done) < SHARDS
    run(command(data, out, workers))
    assert sums(out) == unbroken
    for name, before in done.items():
        status = (out / "train" / name).stat()
        assert (status.st_ino, status.st_mtime_ns) == before
    samples = json.loads((out / "train" / "manifest.json").read_text())["shards"]
    assert sum(shard["samples"] for shard in samples) == IMAGES


@pytest.mark.parametrize("workers", [1, 2, 4])
class TestKilled:
    def test_a_worker_of_ray(self, data: Path, unbroken: dict[str, str], tmp_path: Path, workers: int) -> None:
        """Ray does its task again, and the command does not notice."""
        started = start_to_the_middle(data, tmp_path, workers)
        wait_for(lambda: kill(started, is_task) > 0, started)
        _, errors = started.process.communicate(timeout=WAIT_SECONDS)
        assert started.process.returncode == 0, errors
        assert sums(tmp_path) == unbroken

    def test_the_driver(self, data: Path, unbroken: dict[str, str], tmp_path: Path, workers: int) -> None:
        started = start_to_the_middle(data, tmp_path, workers)
        started.end(signal.SIGKILL)
        goes_on(data, tmp_path, workers, unbroken)

    @pytest.mark.parametrize("killed", [("gcs_server", "raylet"), ("raylet",)], ids=["all of it", "its node"])
    def test_ray(
        self, data: Path, unbroken: dict[str, str], tmp_path: Path, workers: int, killed: tuple[str, ...]
    ) -> None:
        started = start_to_the_middle(data, tmp_path, workers)
        assert kill(started, lambda process: process.name() in killed)
        _, errors = started.process.communicate(timeout=WAIT_SECONDS)
        assert started.process.returncode == 1, errors
        assert errors.strip().splitlines()[-1].startswith("error: Ray has ended")
        assert started.left() == []
        goes_on(data, tmp_path, workers, unbroken)
