"""What a command shows: lines and tables on the terminal, and one progress display for every step."""

import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 10
"""Seconds between two lines of progress where there is no terminal."""


def make_console() -> Console:
    """A console whose lines are left as they are."""
    return Console(highlight=False, soft_wrap=True, markup=False)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table; whatever stands in the cells is text, and a terminal's width does not cut it elsewhere."""
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=200)
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


class ProgressDisplay:
    """How far something is: a bar on a terminal, a line now and then elsewhere. A context manager.

    Args:
        console: where it is shown.
        label: what is being done, such as `train: step`.
        total: how much there is to do.
        unit: of the numbers.
    """

    def __init__(self, console: Console, label: str, total: int, unit: str = "") -> None:
        self._console, self._label, self._total, self._unit = console, label, total, unit
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        text = TextColumn("{task.fields[text]}", markup=False)
        self._progress = Progress(*columns, text, console=console, disable=not console.is_terminal, transient=True)
        self._task = self._progress.add_task(label, total=total, text="")
        self._done = 0
        self._printed = time.monotonic()

    def __enter__(self) -> "ProgressDisplay":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, count: int) -> None:
        """Count more as done."""
        self.update(self._done + count)

    def update(self, done: int, text: str = "", *, print_now: bool = False) -> None:
        """Show how much is done, with a text; `print_now` does not wait for the time of the next line."""
        self._done = done
        self._progress.update(self._task, completed=done, text=text)
        if self._console.is_terminal or not (print_now or time.monotonic() - self._printed >= PLAIN_SECONDS):
            return
        unit = f" {self._unit}" if self._unit else ""
        self._console.print(f"{self._label} {done}/{self._total}{unit}  {text}".rstrip())
        self._printed = time.monotonic()
