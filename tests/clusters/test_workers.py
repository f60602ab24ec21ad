"""Training workers that come, go and stop answering: the numbers are those of workers that stay."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.run_folder import RunFolder
from tests.end_to_end.test_pipeline import PROJECT, SMALL
from tests.heads import RayHead, ray_head
from tests.pipeline.train.runs import losses

STEPS = 600
WAIT_SECONDS = 240


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    with ray_head(tmp_path_factory.mktemp("head"), cpus=1) as head:
        yield head


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards."""
    folder = tmp_path_factory.mktemp("workers")
    subprocess.run(command(folder, "shard", "any"), cwd=PROJECT, check=True, capture_output=True, timeout=300)
    return folder


def command(folder: Path, step: str, name: str, **extra: object) -> list[str]:
    settings = {
        **SMALL,
        "runs": folder / "runs",
        "dataset.root": folder / "shapes",
        "name": name,
        "train.epochs": STEPS // 3,
        "train.checkpoint_epochs": 10,
        "cluster.cpus_per_worker": 1,
        **extra,
    }
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "jobs", step, "-c", "jobs/configs/demo.yaml", *arguments]


class Training:
    """A `raydetr train` in the background."""

    def __init__(self, folder: Path, name: str, environment: dict[str, str] | None = None, **extra: object) -> None:
        self.run = RunFolder(folder / "runs" / name)
        self.log = folder / f"{name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command(folder, "train", name, **extra), cwd=PROJECT, env=environment, stdout=log, stderr=log
            )

    def wait_for(self, what: str, seen: Callable[[], bool]) -> None:
        end = time.monotonic() + WAIT_SECONDS
        while not seen():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, f"{what}: {self.log.read_text()}"
            time.sleep(0.2)

    def wait_for_step(self, step: int) -> None:
        spool = self.run.train_spool
        self.wait_for(f"step {step}", lambda: spool.exists() and max(losses(self.run), default=0) >= step)

    def succeeds(self) -> None:
        assert self.process.wait(WAIT_SECONDS) == 0, self.log.read_text()


@pytest.fixture(scope="module")
def steady(folder: Path) -> RunFolder:
    """A run that one worker did alone."""
    training = Training(folder, "steady", **{"cluster.workers": 1})
    training.succeeds()
    return training.run


def test_the_workers_follow_the_room(head: RayHead, folder: Path, steady: RunFolder, tmp_path: Path) -> None:
    """2, 1 after a node was lost, 2 after another came: the same losses."""
    elastic = {"cluster.address": head.cluster, "cluster.workers": "[1,2]", "cluster.timeout": 20}
    with head.node(tmp_path, cpus=1):
        training = Training(folder, "elastic", head.environment, **elastic)
        training.wait_for_step(STEPS // 8)
        assert "starting 2 workers" in training.log.read_text()
    lost = max(losses(training.run))
    training.wait_for("one worker", lambda: "starting 1 workers, going on" in training.log.read_text())
    training.wait_for_step(lost + 5)
    with head.node(tmp_path, cpus=1):
        training.wait_for("two workers", lambda: training.log.read_text().count("starting 2 workers") == 2)
        training.succeeds()
    assert "there is room for more workers" in training.log.read_text()
    assert losses(training.run) == pytest.approx(losses(steady), rel=1e-4)
    worlds = {
        json.loads(file.read_text())["world_size"] for file in training.run.checkpoints.glob("checkpoint-*/state.json")
    }
    assert worlds == {1, 2}


def test_a_node_that_is_taken_away_with_notice_costs_no_step(
    head: RayHead, folder: Path, steady: RunFolder, tmp_path: Path
) -> None:
    """What a preemptible machine's notice becomes: Ray is told that the node is drained, and when it ends."""
    elastic = {"cluster.address": head.cluster, "cluster.workers": "[1,2]"}
    with head.node(tmp_path, cpus=1):
        training = Training(folder, "noticed", head.environment, **elastic)
        training.wait_for_step(STEPS // 8)
        head.drain(deadline=60)
        training.wait_for("one worker", lambda: "starting 1 workers, going on" in training.log.read_text())
        told = training.log.read_text()
    training.succeeds()
    assert "will go away: one more checkpoint, then on without" in told
    assert "; restart " not in told
    assert losses(training.run) == pytest.approx(losses(steady), rel=1e-4)


def test_a_cluster_without_room_is_waited_for_and_then_told(head: RayHead, folder: Path) -> None:
    small = {"cluster.address": head.cluster, "cluster.workers": 2, "cluster.wait": 8}
    training = Training(folder, "no-room", head.environment, **small)
    assert training.process.wait(WAIT_SECONDS) == 2
    told = training.log.read_text()
    assert "waiting for room for 2 workers; Ray has it for 1" in told
    assert "after 8 s (cluster.wait) the Ray cluster has room for 1 of 2 workers: add nodes" in told


def test_a_stopped_worker_is_lost_and_replaced(folder: Path, steady: RunFolder) -> None:
    """It answers nobody and holds what it has: only the watch of the other notices it."""
    training = Training(folder, "stopped", **{"cluster.workers": 2, "cluster.timeout": 10})
    training.wait_for_step(STEPS // 8)
    workers = [
        process
        for process in psutil.Process(training.process.pid).children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]
    workers[-1].send_signal(signal.SIGSTOP)
    training.succeeds()
    assert "gave no sign of life for 10 s" in training.log.read_text()
    assert "pipeline/train/loop.py" in next(training.run.stacks.iterdir()).read_text()
    assert losses(training.run) == pytest.approx(losses(steady), rel=1e-4)
