"""One logger for the whole program, which knows its rank.

`get_logger(__name__)` names a logger; `set_up_logging(rank)` is called once by an entry point. Information is printed
by rank 0 alone, warnings and errors by every rank, with its number.
"""

import logging
import sys

from pipeline.errors import printable

ROOT = "raydetr"


def get_logger(name: str) -> logging.Logger:
    """A logger below the program's own, so that other libraries' logging stays as it is."""
    return logging.getLogger(f"{ROOT}.{name}")


class _RankFilter(logging.Filter):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = f"[rank {self.rank}] " if self.rank else ""
        return self.rank == 0 or record.levelno >= logging.WARNING


class _Formatter(logging.Formatter):
    """Names of the user's cannot steer the terminal that a message is printed on."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802, logging's own name
        record.message = printable(record.message)
        return super().formatMessage(record)


def set_up_logging(rank: int = 0, level: int = logging.INFO) -> None:
    """Print to stderr from now on; calling it again replaces the rank and the level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_RankFilter(rank))
    handler.setFormatter(_Formatter("%(asctime)s %(rank)s%(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger(ROOT)
    root.handlers[:] = [handler]
    root.setLevel(level)
    root.propagate = False


def outcome(step: str, what: object, *, is_new: bool) -> str:
    """What came of a step, as one line: with "already done" where nothing had to be done."""
    return f"{step}: {'' if is_new else 'already done, '}{what}"
