"""Two commands that score one run, on a disk and in a store."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline import lease, mirror
from pipeline.errors import UserError
from pipeline.evaluate.claims import Claims, following
from pipeline.mirror import driver_mirror
from pipeline.run_folder import RunFolder
from pipeline.store import StorePath

METRICS = {"AP": 0.5, "step": 5}
NAME = "checkpoint-5"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("RENEW", 0.1), ("LOST", 1.0), ("LOOK", 0.05), ("SETTLE", 0.0)):
        monkeypatch.setattr(lease, f"{name}_SECONDS", seconds)
    monkeypatch.setattr(mirror, "SYNC_SECONDS", 0.05)


class Two:
    """A run with its driver and its follower, each there until its stack is closed."""

    def __init__(self, run: RunFolder, elsewhere: RunFolder, stack: ExitStack) -> None:
        self.run, self.driving, self.following = run, stack.enter_context(ExitStack()), stack.enter_context(ExitStack())
        self.mirror = self.driving.enter_context(driver_mirror(run, "the run"))
        self.following.enter_context(counted(self.following.enter_context(following(elsewhere, "following the run"))))
        self.elsewhere = elsewhere
        self.driver = Claims(run, "driver", self.mirror.sync)
        self.follower = Claims(elsewhere, "follower")


@contextmanager
def counted(renew: Callable[[], None]) -> Iterator[None]:
    ends = threading.Event()

    def count() -> None:
        while not ends.wait(0.05):
            renew()

    counting = threading.Thread(target=count)
    counting.start()
    try:
        yield
    finally:
        ends.set()
        counting.join()


@pytest.fixture(params=["disk", "store"])
def two(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Two]:
    with ExitStack() as stack:
        if request.param == "disk":
            yield Two(RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run"), stack)
        else:
            store: StorePath = request.getfixturevalue("s3_folder") / "run"
            yield Two(RunFolder(tmp_path / "driver", store), RunFolder(tmp_path / "follower", store), stack)


def write_checkpoints(two: Two, *steps: int) -> None:
    """As the training workers do."""
    for step in steps:
        folder = two.run.checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
        if two.run.store is not None:
            (two.run.store / f"checkpoints/checkpoint-{step}/state.json").write_bytes(b"{}")


def test_one_of_them_scores_a_checkpoint(two: Two) -> None:
    subset = 0
    for first, second in ((two.driver, two.follower), (two.follower, two.driver)):
        assert first.take(NAME, subset)
        assert not second.take(NAME, subset)
        assert second.take("checkpoint-10", subset)
        assert second.take(NAME, subset + 1)
        for each in (first, second):
            each.give_back(NAME, subset)
            each.give_back(NAME, subset + 1)
            each.give_back("checkpoint-10", subset)
    assert two.driver.take(NAME, subset)
    two.driver.keep(NAME, subset, METRICS, b"[]")
    two.driver.give_back(NAME, subset)
    assert not two.follower.take(NAME, subset)
    assert two.follower.is_scored(NAME, subset)
    assert not two.follower.is_scored(NAME, subset + 1)
    assert two.run.scores(subset).keys() == {NAME}


def test_both_see_the_checkpoints(two: Two) -> None:
    assert two.follower.checkpoints() == two.driver.checkpoints() == []
    write_checkpoints(two, 10, 5, 100)
    for side in (two.follower, two.driver):
        assert [path.name for path in side.checkpoints()] == ["checkpoint-5", "checkpoint-10", "checkpoint-100"]


def test_what_the_follower_scores_comes_home_once(two: Two) -> None:
    subset = 20
    told: list[tuple[str, Any]] = []
    assert two.follower.take(NAME, subset)
    two.follower.keep(NAME, subset, METRICS, b"[1]")
    two.follower.give_back(NAME, subset)
    two.mirror.sync()
    assert two.driver.is_scored(NAME, subset)
    assert not two.driver.take(NAME, subset)
    for _ in range(2):
        two.driver.take_home(lambda name, metrics: told.append((name, metrics)))
        two.mirror.sync()
    assert told == [(NAME, METRICS)]
    home = two.run.results(subset) / NAME
    assert (home / "detections.json").read_bytes() == b"[1]"
    assert two.run.scores(subset) == {NAME: home / "metrics.json"}
    assert two.follower.is_scored(NAME, subset)
    two.follower.keep(NAME, subset, METRICS, b"[2]")  # as if a driver had been cut before it was told
    two.mirror.sync()
    Claims(two.run, "driver", two.mirror.sync).take_home(lambda name, metrics: told.append((name, metrics)))
    assert (len(told), (home / "detections.json").read_bytes()) == (2, b"[1]")
    two.mirror.sync()
    assert not list((two.run.followed / "results").rglob("*.json"))


def test_one_that_is_gone_has_no_claims(two: Two) -> None:
    for side, stack, other in ((two.follower, two.following, two.driver), (two.driver, two.driving, two.follower)):
        if side is two.driver:
            two.driver.clear()
            two.follower.clear()
            two.following.enter_context(counted(two.following.enter_context(following(two.elsewhere, "following"))))
        assert side.take(NAME)
        assert not other.take(NAME)
        stack.close()
        assert other.take(NAME)


def test_what_an_earlier_process_has_claimed_is_cleared(two: Two) -> None:
    assert two.driver.take(NAME, 20)
    two.driver.clear()
    assert two.follower.take(NAME, 20)


def test_a_second_follower_is_refused(two: Two) -> None:
    refused = pytest.raises(UserError, match=r"following the run is running already.* on .* process \d+")
    with refused, following(two.run, "following the run"):
        pass
