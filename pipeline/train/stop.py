"""Ending a run in order: it is asked for from outside, agreed by all ranks between two steps, and kept as a checkpoint.

A driver asks by making the file `RunFolder.stop`; in a process of its own (`python -m pipeline.train`, `torchrun`)
SIGINT or SIGTERM does; and in either the end of `train.max_hours`.
"""

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from pipeline.log import get_logger
from pipeline.store import Place

logger = get_logger(__name__)

LOOK_SECONDS = 0.2
"""Least time between two looks for the file, which may lie on a slow disk."""


class StoppedError(Exception):
    """Training ended before its last step, because it was asked to."""

    def __init__(self, checkpoint: Place | None) -> None:
        super().__init__(f"training is kept in {checkpoint}" if checkpoint else "nothing was trained yet")


def end_of(hours: float | None) -> float | None:
    """Unix time at which a command that began with this process has run for so long; None without a limit."""
    began: float = psutil.Process().create_time()
    return None if hours is None else began + 3600 * hours


class StopRequest:
    """Whether this process knows that training is to end.

    Args:
        file: whoever makes it asks for the end.
        at: Unix time that asks for it, too.
    """

    def __init__(self, file: Path, at: float | None = None) -> None:
        self._file, self._at = file, at
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
        if not self._asked.is_set() and self._at is not None and time.time() >= self._at:
            logger.info("train.max_hours are over: training ends after this step")
            self._asked.set()
        return self._asked.is_set()
