"""What a command shows, with a terminal and without one."""

import io

import pytest
from rich.console import Console

from jobs.console import PLAIN_SECONDS, ProgressDisplay, make_console


class Clock:
    """The time, which tests set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("jobs.console.time.monotonic", made)
    return made


def plain() -> Console:
    return Console(file=io.StringIO(), width=80, force_terminal=False)


def shown_on(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class TestWithoutATerminal:
    def test_a_line_now_and_then(self, clock: Clock) -> None:
        console = plain()
        with ProgressDisplay(console, "shard: train", 9, "shards") as shown:
            for done in range(1, 10):
                clock.now += PLAIN_SECONDS / 2
                shown.update(done, f"at {done}")
        assert shown_on(console).splitlines() == [f"shard: train {done}/9 shards  at {done}" for done in (2, 4, 6, 8)]

    def test_nothing_before_it_is_time(self, clock: Clock) -> None:
        console = plain()
        with ProgressDisplay(console, "shard: train", 100) as shown:
            for _ in range(100):
                shown.advance(1)
            clock.now += PLAIN_SECONDS - 0.01
            shown.advance(0)
        assert shown_on(console) == ""

    def test_at_once_when_asked_to(self, clock: Clock) -> None:
        console = plain()
        with ProgressDisplay(console, "train: step", 8) as shown:
            shown.update(1, "loss 2.5", print_now=True)
            clock.now += PLAIN_SECONDS - 0.01
            shown.update(2, "loss 2.4")
        assert shown_on(console) == "train: step 1/8  loss 2.5\n"

    def test_advancing_counts_on(self, clock: Clock) -> None:
        console = plain()
        with ProgressDisplay(console, "verify: val", 9, "shards") as shown:
            shown.update(3)
            shown.advance(2)
            clock.now += PLAIN_SECONDS
            shown.advance(1)
        assert shown_on(console) == "verify: val 6/9 shards\n"


class TestOnATerminal:
    def test_a_bar_that_goes_away(self) -> None:
        console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
        with ProgressDisplay(console, "train: step", 8) as shown:
            shown.update(3, "loss 2.5", print_now=True)
        text = shown_on(console)
        assert "train: step" in text
        assert "3/8" in text
        assert "loss 2.5" in text
        assert "━" in text
        assert "train: step 3/8" not in text, "no plain line beside the bar"
        assert text.rstrip().endswith("\x1b[2K"), "its line is wiped"

    def test_it_says_how_much_is_done_in_all(self) -> None:
        console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
        with ProgressDisplay(console, "shard: train", 5) as shown:
            shown.advance(2)
            shown.advance(2)
        assert "4/5" in shown_on(console)


def test_lines_are_left_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{'word ' * 60}42 'text' /a/path"
    make_console().print(line)
    assert capsys.readouterr().out == f"{line}\n"
