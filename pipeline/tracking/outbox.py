"""The outbox: all that a run has for MLflow and that waits on the disk until the server has it.

    <run>/outbox/
        operations.jsonl  parameters, spools of points, artifacts, status and versions, in their order
        uploaded.json     how many of them which MLflow run has got, and which of those it has not
        names.json        the legal names that stand for names that MLflow refuses
        refused.jsonl     what the server refused, and why; nothing waits for it

An operation is keyed and can be repeated: it may be cut anywhere and is then done again from its beginning. Points are
not written twice: their operation names a spool, which is uploaded as far as it goes. One process at a time writes
here, the one that holds the run's lock.
"""

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.config.values import digest
from pipeline.files import disk_error, write_json
from pipeline.log import get_logger
from pipeline.tracking.names import legal_names
from pipeline.tracking.spool import cut_torn_line

logger = get_logger(__name__)


@dataclass(frozen=True)
class Operation:
    """One line of the outbox."""

    kind: str
    """What is to be done: params, points, artifacts, status, or what a handler of the tracker knows."""
    subject: str
    """What it is done to; an operation that is the same as the last of its kind and subject is not added."""
    time: float
    """Seconds since the epoch at which it was wanted."""
    body: dict[str, Any]
    """What its handler needs."""

    @property
    def key(self) -> str:
        """Digest of what is wanted, whenever it is."""
        return digest([self.kind, self.subject, self.body])


class Outbox:
    """The operations of a run.

    Args:
        folder: made with the first operation.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "operations.jsonl"
        cut_torn_line(self._file)
        self._operations = list(_read(self._file))
        self._names: dict[str, str] = _read_json(folder / "names.json", {})
        self._warned: set[str] = set()

    def add(self, kind: str, subject: str, body: Mapping[str, Any], *, again: bool = False) -> Operation:
        """Append an operation, unless it is the same as the last of its kind and subject; it is on the disk then.

        Args:
            kind: see `Operation`.
            subject: see `Operation`.
            body: see `Operation`; JSON values.
            again: append it in any case.
        """
        operation = Operation(kind, subject, time.time(), dict(body))
        last = self.last(kind, subject)
        if last is not None and last.key == operation.key and not again:
            return last
        try:
            self._append(self._file, asdict(operation))
            self._operations.append(operation)
        except BaseException:  # a signal may come between the two
            self._operations = list(_read(self._file))
            raise
        return operation

    def last(self, kind: str, subject: str = "") -> Operation | None:
        """The newest operation of a kind and a subject."""
        alike = (each for each in reversed(self._operations) if (each.kind, each.subject) == (kind, subject))
        return next(alike, None)

    def since(self) -> float:
        """When the run began, in seconds since the epoch: the time of its first operation."""
        return self._operations[0].time if self._operations else time.time()

    def spools(self) -> list[Path]:
        """The spools whose points are wanted."""
        names = dict.fromkeys(each.subject for each in self._operations if each.kind == "points")
        return [self.path(name) for name in names]

    def pending(self, run_id: str) -> list[Operation]:
        """The operations that an MLflow run has not got, oldest first; all of them where the run is another one."""
        count, behind = self._uploaded(run_id)
        return [self._operations[index] for index in behind] + self._operations[count:]

    def done(self, run_id: str, operation: Operation) -> None:
        """Remember that the run has got one that was pending; those before it may still be."""
        count, behind = self._uploaded(run_id)
        index = next(index for index, each in enumerate(self._operations) if each is operation)
        behind = [each for each in (*behind, *range(count, index)) if each != index]
        write_json(self.folder / "uploaded.json", {"run_id": run_id, "count": max(count, index + 1), "behind": behind})

    def refuse(self, kind: str, what: Any, why: str, detail: str) -> None:
        """Set aside what the server does not take; one warning a kind, which does not hold the detail."""
        file = self.folder / "refused.jsonl"
        self._append(file, {"time": time.time(), "kind": kind, "what": what, "why": why, "detail": detail})
        if kind not in self._warned:
            logger.warning("the tracking server refuses %s; it is set aside in %s (%s)", _names(kind, what), file, why)
        self._warned.add(kind)

    def legal(self, names: Iterable[str]) -> dict[str, str]:
        """The names by which MLflow knows metrics, params and tags: the same one always, and none for two of them."""
        wanted = list(names)
        made = legal_names(wanted, self._names)
        self._names |= made
        if made:
            write_json(self.folder / "names.json", self._names)
        return {name: self._names[name] for name in wanted}

    def reference(self, path: Path) -> str:
        """How an operation names a file: below the run's folder by its place there, so that the folder may move."""
        run = self.folder.parent.resolve()
        full = path.resolve()
        return full.relative_to(run).as_posix() if full.is_relative_to(run) else str(full)

    def path(self, reference: str) -> Path:
        """The file that a reference names."""
        return self.folder.parent / reference

    def _uploaded(self, run_id: str) -> tuple[int, list[int]]:
        """How far a run has got the operations, and which before that point it has not."""
        state = _read_json(self.folder / "uploaded.json", {})
        if not run_id or state.get("run_id") != run_id:
            return 0, []
        return int(state["count"]), list(state.get("behind", []))

    def _append(self, file: Path, line: Mapping[str, Any]) -> None:
        """Write a line whole or not at all, whatever comes in between."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("ab", buffering=0) as opened:
                size = opened.tell()
                try:
                    opened.write(json.dumps(line).encode() + b"\n")
                    os.fsync(opened.fileno())
                except OSError:
                    opened.truncate(size)
                    raise
        except OSError as error:
            raise disk_error(file, error, "runs") from error


def _read(file: Path) -> Iterable[Operation]:
    if not file.exists():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield Operation(**json.loads(line))
        except (ValueError, TypeError):
            logger.warning("%s: leaving out a line that is no operation", file)


def _read_json(file: Path, empty: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else empty


def _names(kind: str, what: Any) -> str:
    name = what.get("name") if isinstance(what, dict) else None
    return f"the {kind} {name!r}" if name else f"an upload ({kind})"
