"""`ray job stop` at moments all over a run: what is left behind, and what the same command comes to afterwards."""

import hashlib
import json
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.test_pipeline import SMALL
from tests.heads import RayHead, ray_head

END_SECONDS = 10
WAIT_SECONDS = 120
STEPS = 60
SEED = 20


def command(folder: Path, data: Path) -> list[str]:
    settings = {**SMALL, "runs": folder / "runs", "dataset.root": data, "shards.max_samples": 2}
    settings |= {
        "train.epochs": STEPS // 3,
        "train.checkpoint_epochs": STEPS // 6,
        "train.log_steps": 5,
        "evaluate.curve": False,
    }
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["python", "-m", "jobs", "run", "-c", "jobs/configs/demo.yaml", *arguments]


def weights(folder: Path) -> str:
    """The sha256 of the weights at the end of the schedule."""
    last = folder / "runs" / "demo" / "checkpoints" / f"checkpoint-{STEPS}"
    assert json.loads((last / "state.json").read_text())["step"] == STEPS
    return hashlib.sha256((last / "model.safetensors").read_bytes()).hexdigest()


def statuses(folder: Path) -> list[str]:
    """Those of all MLflow runs of a folder."""
    database = folder / "runs" / "mlflow.db"
    if not database.exists():
        return []
    with closing(sqlite3.connect(database)) as opened:
        return [status for (status,) in opened.execute("select status from runs")]


def left(mark: str) -> list[str]:
    """Command lines of the processes of a job, which are told by a variable of their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAYDETR_TEST_MARK") == mark:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def started(folder: Path, mark: str) -> int:
    return sum("-m jobs run" in line for line in left(mark))


def sharded(folder: Path, mark: str) -> int:
    return len(list((folder / "runs").rglob("shard-*.json")))


def trained(folder: Path, mark: str) -> int:
    points = folder / "runs" / "demo" / "spool" / "train.jsonl"
    return len(points.read_text().splitlines()) if points.exists() else 0


def evaluated(folder: Path, mark: str) -> int:
    return (folder / "runs" / "demo" / "checkpoints" / f"checkpoint-{STEPS}" / "state.json").exists()


def registered(folder: Path, mark: str) -> int:
    operations = folder / "runs" / "demo" / "outbox" / "operations.jsonl"
    return operations.read_text().count('"kind": "version"') if operations.exists() else 0


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    with ray_head(tmp_path_factory.mktemp("head")) as head:
        yield head


@pytest.fixture(scope="module")
def unbroken(head: RayHead, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The data, and the sha256 of the weights of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = head.submit(*command(folder, folder / "shapes"))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "shapes", weights(folder)


def start(head: RayHead, words: list[str], mark: str, **variables: str) -> None:
    environment = json.dumps({"env_vars": {"RAYDETR_TEST_MARK": mark, **variables}})
    begun = head.submit(*words, options=("--no-wait", "--submission-id", mark, "--runtime-env-json", environment))
    assert begun.returncode == 0, begun.stdout + begun.stderr


def stop(head: RayHead, mark: str) -> None:
    """Stop a job, and see that it leaves no process."""
    head.stop(mark)
    end = time.monotonic() + END_SECONDS
    while left(mark):
        assert time.monotonic() < end, left(mark)
        time.sleep(0.1)


def stop_at(
    head: RayHead,
    words: list[str],
    folder: Path,
    moment: Callable[[Path, str], int],
    most: float,
    *,
    may_have_ended: bool = False,
    **variables: str,
) -> None:
    """Submit a job, and stop it at most so many seconds after something has happened in it."""
    mark = f"stopped-{moment.__name__}-{len(variables)}"
    before = moment(folder, mark)
    start(head, words, mark, **variables)
    end = time.monotonic() + WAIT_SECONDS
    while moment(folder, mark) == before:
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(random.Random(f"{SEED} {mark}").uniform(0, most))
    stop(head, mark)
    assert statuses(folder) in ([], ["KILLED"], *([["FINISHED"]] if may_have_ended else [])), mark


def test_a_stopped_job_is_killed_and_goes_on(head: RayHead, unbroken: tuple[Path, str], tmp_path: Path) -> None:
    """Each job goes on where the one before it was stopped."""
    data, expected = unbroken
    words = command(tmp_path, data)
    stop_at(head, words, tmp_path, started, 6)
    stop_at(head, words, tmp_path, sharded, 0.3)
    stop_at(head, words, tmp_path, trained, 1)
    checkpoints = tmp_path / "runs" / "demo" / "checkpoints"
    before = set(checkpoints.iterdir())
    stop_at(head, words, tmp_path, trained, 0, RAY_JOB_STOP_WAIT_TIME_S="30")
    assert set(checkpoints.iterdir()) > before, "there was time for a checkpoint"
    stop_at(head, words, tmp_path, evaluated, 2)
    stop_at(head, words, tmp_path, registered, 1, may_have_ended=True)
    done = head.submit(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert weights(tmp_path) == expected
    assert statuses(tmp_path) == ["FINISHED"]
