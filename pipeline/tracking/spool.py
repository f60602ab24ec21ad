"""A spool: points of curves on their way to MLflow, as JSON lines on disk.

Training workers never talk to a server: rank 0 appends to a `Spool`, and the driver's `Tracker` uploads from it.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.files import disk_told
from pipeline.log import get_logger

logger = get_logger(__name__)

SETTING = "runs"
"""Key of the configuration by which spools are written elsewhere."""
SAME = 1e-3
"""Relative difference of two values of one step that counts as none: another world size rounds otherwise."""


@dataclass(frozen=True)
class SpoolRecord:
    """One line of a spool."""

    time: float
    """Seconds since the epoch at which the point was measured."""
    step: int
    """Optimizer step of the point."""
    metrics: dict[str, float]
    """Values by metric name."""
    kind: str
    """What wrote the line; `metrics` for points of a curve."""
    end: int
    """Offset in bytes of the next line."""


class Spool:
    """Appends points to a file of JSON lines, each flushed: a killed process loses at most the line it was writing.

    Args:
        path: the file; made with its folder when missing. A torn last line of a killed writer is cut off.
        clock: gives the time stamps, in seconds since the epoch.

    Raises:
        UserError: here and in `write`: the disk is full, or the file cannot be written.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        with disk_told(path, SETTING):
            path.parent.mkdir(parents=True, exist_ok=True)
            cut_torn_line(path)
            self._known: dict[int, dict[str, float]] = {}
            for record in SpoolReader(path).read():
                self._known[record.step] = self._known.get(record.step, {}) | record.metrics
            self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float], kind: str = "metrics") -> None:
        """Append the values that were measured at `step`."""
        values = {name: float(value) for name, value in metrics.items()}
        record = {"time": self._clock(), "step": int(step), "metrics": values, "kind": kind}
        with disk_told(self.path, SETTING):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def write_once(self, step: int, metrics: Mapping[str, float], key: str) -> None:
        """`write`, unless the file had a point of this step with the same value of `key`: what a restart repeats."""
        known = self._known.get(step)
        if (
            known is None
            or (key in known) != (key in metrics)
            or not math.isclose(known.get(key, 0), metrics.get(key, 0), rel_tol=SAME)
        ):
            self.write(step, metrics)

    def close(self) -> None:
        """Close the file; further writes are errors."""
        with suppress(OSError):  # every write is flushed: what fails here failed and was told before
            self._file.close()

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def cut_torn_line(path: Path) -> None:
    """Cut off a last line that a killed process did not finish."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        logger.warning("%s: cutting off a last line that was torn by a crash", path)
        os.truncate(path, whole)


class SpoolReader:
    """Reads the whole lines that were added to a spool since the last read; the file may not exist yet.

    `offset` is the position in bytes of the next line: the whole state of the reader.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self.offset = offset

    def read(self, limit: int | None = None) -> list[SpoolRecord]:
        """Return the new records, oldest first, and move on past them.

        Args:
            limit: stop after the record with which this many metric values are reached; None reads everything.
        """
        if not self.path.exists():
            return []
        records: list[SpoolRecord] = []
        values = 0
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.offset += len(line)
                record = self._parse(line)
                if record is None:
                    continue
                records.append(record)
                values += len(record.metrics)
                if limit is not None and values >= limit:
                    break
        return records

    def _parse(self, line: bytes) -> SpoolRecord | None:
        try:
            entry = json.loads(line)
            return SpoolRecord(
                entry["time"], entry["step"], entry["metrics"], entry.get("kind", "metrics"), self.offset
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            logger.warning("%s: leaving out a line before byte %d that is not a record", self.path, self.offset)
            return None
