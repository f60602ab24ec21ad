"""A pool of tasks on a real Ray."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from jobs.cluster import connected
from jobs.tasks import run_tasks
from pipeline.config.sections import ClusterSection
from pipeline.errors import StoreError, UserError
from tests.jobs.test_interrupt import rest, started


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with connected(ClusterSection(workers=2)):
            yield


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"{path} was not made"
        time.sleep(0.01)


def test_results_come_as_they_end_with_their_arguments(tmp_path: Path) -> None:
    def task(number: int) -> int:
        if number == 1:
            wait_for(tmp_path / "go on")
        return number * 10

    results = run_tasks(task, [1, 2, 3], at_once=2, cpus=0.1)
    first = [next(results), next(results)]
    (tmp_path / "go on").touch()
    assert [*first, *results] == [(2, 20), (3, 30), (1, 10)]


def test_no_arguments_are_no_results() -> None:
    assert list(run_tasks(str, [], at_once=2)) == []


@pytest.mark.parametrize("at_once", [1, 2])
def test_at_most_so_many_at_a_time(at_once: int, tmp_path: Path) -> None:
    def task(number: int) -> int:
        (tmp_path / f"{number}").touch()
        time.sleep(0.1)
        running = len(list(tmp_path.iterdir()))
        (tmp_path / f"{number}").unlink()
        return running

    counts = [running for _, running in run_tasks(task, range(6), at_once=at_once, cpus=0.1)]
    assert max(counts) <= at_once


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        pytest.param(UserError("a.jpg: it is damaged"), r"^a\.jpg: it is damaged$", id="of the user"),
        pytest.param(StoreError("s3://a: it is away"), r"^s3://a: it is away$", id="of a store"),
        pytest.param(ValueError("a bug"), "a bug", id="of ours"),
    ],
)
def test_one_failure_ends_the_others(raised: Exception, told: str, tmp_path: Path) -> None:
    def task(number: int) -> None:
        if number == 1:
            wait_for(tmp_path / "begun")
            raise raised
        for _ in range(600):
            (tmp_path / f"{number} is alive").touch()
            (tmp_path / "begun").touch()
            time.sleep(0.05)
        (tmp_path / f"{number} ended").touch()

    with pytest.raises(type(raised) if isinstance(raised, UserError) else RayTaskError, match=told):
        list(run_tasks(task, [1, 2, 3], at_once=2, cpus=0.1))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"begun", "2 is alive"}, "2 was cancelled, and 3 was not begun"
    (tmp_path / "2 is alive").unlink()
    time.sleep(0.2)
    assert not (tmp_path / "2 is alive").exists(), "it is gone when the error is raised"


def test_a_signal_ends_the_wait_for_a_task_that_cannot_be_cancelled() -> None:
    code = (
        "import time\n"
        "from jobs.cluster import connected\n"
        "from jobs.interrupt import Interrupted, end_in_order\n"
        "from jobs.tasks import run_tasks\n"
        "from pipeline.config.sections import ClusterSection\n"
        "end_in_order()\n"
        "try:\n"
        "    with connected(ClusterSection(workers=1)):\n"
        "        for _ in run_tasks(time.sleep, [0, 600], at_once=1, cpus=0.1):\n"
        "            print('ready', flush=True)\n"
        "except Interrupted as interrupted:\n"
        "    print(interrupted)\n"
    )
    process = started(code)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert rest(process) == "SIGINT\n"
