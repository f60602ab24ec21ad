"""A request to end training in order."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.train.stop import LOOK_SECONDS, StopRequest, end_of


@pytest.fixture
def handlers() -> Iterator[None]:
    """Leave the handlers of the test's own process as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nobody_asks(tmp_path: Path) -> None:
    assert not StopRequest(tmp_path / "stop").asked()


def test_a_file_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: seconds[0])
    seconds[0] = 100.0
    request = StopRequest(tmp_path / "stop")
    assert not request.asked()
    (tmp_path / "stop").touch()
    assert not request.asked(), "the disk is not asked at every step"
    seconds[0] += LOOK_SECONDS
    assert request.asked()
    (tmp_path / "stop").unlink()
    assert request.asked(), "what was asked for stays so"


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_the_first_signal_asks_and_the_second_acts_as_ever(number: signal.Signals, tmp_path: Path) -> None:
    came: list[int] = []
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda number, frame: came.append(number))
    request = StopRequest(tmp_path / "stop")
    request.on_signals()
    os.kill(os.getpid(), number)
    assert request.asked()
    assert came == []
    os.kill(os.getpid(), number)
    assert came == [number]


def test_the_hours_are_counted_from_the_begin_of_the_command() -> None:
    assert end_of(None) is None
    assert end_of(0.5) == psutil.Process().create_time() + 1800


def test_a_time_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [99.0]
    monkeypatch.setattr("time.time", lambda: seconds[0])
    request = StopRequest(tmp_path / "stop", 100.0)
    assert not request.asked()
    seconds[0] = 100.0
    assert request.asked()
    assert not StopRequest(tmp_path / "stop").asked()
