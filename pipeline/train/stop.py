"""Ending a run in order: it is asked for from outside, agreed by all ranks between two steps, and kept as a checkpoint.

A driver asks by making the file `RunFolder.stop`; in a process of its own (`python -m pipeline.train`, `torchrun`)
SIGINT or SIGTERM does.
"""

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

LOOK_SECONDS = 0.2
"""Least time between two looks for the file, which may lie on a slow disk."""


class StoppedError(Exception):
    """Training ended before its last step, because it was asked to."""

    def __init__(self, checkpoint: Path | None) -> None:
        super().__init__(f"training is kept in {checkpoint}" if checkpoint else "nothing was trained yet")


class StopRequest:
    """Whether this process knows that training is to end.

    Args:
        file: whoever makes it asks for the end.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._asked = threading.Event()
        self._looked = 0.0

    def on_signals(self) -> None:
        """Take SIGINT and SIGTERM as a request, once: a second one ends the process as ever."""

        def ask(number: int, frame: FrameType | None) -> None:
            self._asked.set()
            for other, handler in before.items():
                signal.signal(other, handler)

        before: dict[int, Any] = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def asked(self) -> bool:
        """Whether it was asked for."""
        if not self._asked.is_set() and time.monotonic() - self._looked >= LOOK_SECONDS:
            self._looked = time.monotonic()
            if self._file.exists():
                self._asked.set()
        return self._asked.is_set()
