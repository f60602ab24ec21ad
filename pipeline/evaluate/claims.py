"""Two commands that score one run, so that nothing is scored twice: the driver, which works on the run, and a follower.

    <run>/followed/lock, lease.json         who follows: of a run on a disk, in a store
    <run>/followed/claims/<side>/<key>      what a side is scoring; it counts while that side is there
    <run>/followed/results/<key>            what the follower has scored, until the driver has taken it home

A key names a folder of scores below `evaluate`. Every file has one side that writes it. Where a disk shows one host's
files to another late, a checkpoint may be scored twice: the first result counts.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pipeline.checkpoint.state import checkpoints
from pipeline.errors import StoreError
from pipeline.evaluate.results import DETECTIONS_FILE
from pipeline.files import held, is_held, make_folder, read_json, write_whole
from pipeline.lease import Lease, Watch
from pipeline.mirror import LEASE, checkpoints_in_store
from pipeline.run_folder import METRICS_FILE, RunFolder
from pipeline.store import Place

Side = Literal["driver", "follower"]


class Claims:
    """What one of the two sides sees and says of a run's scores.

    Args:
        run: the run; of one in a store the driver has a copy, and the follower has none.
        side: which of the two this is.
        sync: makes the driver's copy and the store alike.
    """

    def __init__(self, run: RunFolder, side: Side, sync: Callable[[], None] = lambda: None) -> None:
        self._run, self._side, self._sync = run, side, sync
        self._other: Side = "driver" if side == "follower" else "follower"
        self._shared: Place = (run.store or run.path) / "followed"
        self._seen: Place = run.path if side == "driver" else run.store or run.path
        lease = LEASE if self._other == "driver" else f"followed/{LEASE}"
        self._lease = None if run.store is None else Watch(run.store / lease)
        self._told: set[Path] = set()
        self._lock = run.lock if self._other == "driver" else run.followed / "lock"

    def clear(self) -> None:
        """Claim nothing: what an earlier process of this side has left counts again once this one is there."""
        own = self._shared / "claims" / self._side
        if isinstance(own, Path):
            shutil.rmtree(own, ignore_errors=True)
        else:
            for name in own.list():
                (own / name).unlink()

    def checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first."""
        if isinstance(self._seen, Path):
            return checkpoints(self._seen / "checkpoints")
        return checkpoints_in_store(self._run)

    def is_scored(self, name: str, subset: int = 0) -> bool:
        """Whether either side has scored a checkpoint; `subset` as of `RunFolder.results`."""
        files = [
            self._seen / folder / self.key(name, subset) / METRICS_FILE for folder in ("evaluate", "followed/results")
        ]
        return any(file.exists() for file in files)

    @staticmethod
    def key(name: str, subset: int = 0) -> str:
        """The key of a checkpoint's scores on so many images; 0 for all."""
        return f"subset-{subset}/{name}" if subset else name

    def take(self, name: str, subset: int = 0) -> bool:
        """Whether this side scores a checkpoint now; False where it is scored, or the other side is at it."""
        key = self.key(name, subset)
        if self._is_taken(key) or self.is_scored(name, subset):
            return False
        own = self._shared / "claims" / self._side / key
        if isinstance(own, Path):
            make_folder(own.parent)
        write_whole(own, b"{}\n")
        # Each side writes before it looks: of two that take it at the same moment one finds the other's claim.
        if self._is_taken(key) or self.is_scored(name, subset):
            own.unlink(missing_ok=True)
            return False
        return True

    def give_back(self, name: str, subset: int = 0) -> None:
        """It is scored, or not by this side; what the driver has written is where the follower looks before that."""
        with suppress(StoreError):  # the claim then counts until this command ends
            self._sync()
            (self._shared / "claims" / self._side / self.key(name, subset)).unlink(missing_ok=True)

    def keep(self, name: str, subset: int, metrics: dict[str, Any], detections: bytes) -> None:
        """Write the results of a checkpoint: the driver where they belong, the follower for the driver.

        Raises:
            StoreError: the store fails.
        """
        top: Place = self._run.evaluation if self._side == "driver" else self._shared / "results"
        folder = top / self.key(name, subset)
        if isinstance(folder, Path):
            make_folder(folder)
        write_whole(folder / DETECTIONS_FILE, detections)
        write_whole(folder / METRICS_FILE, (json.dumps(metrics, indent=1) + "\n").encode())

    def take_home(self, tell: Callable[[str, dict[str, Any]], None]) -> None:
        """Put what the follower has left where it belongs; for the driver.

        Args:
            tell: called with the name of each checkpoint, and its metrics.
        """
        assert self._side == "driver"
        results = self._run.followed / "results"
        taken = sorted(file.parent for file in results.rglob(METRICS_FILE))
        for folder in taken:
            home = self._run.evaluation / folder.relative_to(results)
            if not (home / METRICS_FILE).is_file():
                make_folder(home)
                write_whole(home / DETECTIONS_FILE, (folder / DETECTIONS_FILE).read_bytes())
                write_whole(home / METRICS_FILE, (folder / METRICS_FILE).read_bytes())
            if folder not in self._told:  # by this command: one before it may have been cut here
                tell(folder.name, read_json(home / METRICS_FILE, "metrics file"))
            self._told.add(folder)
        with suppress(StoreError):  # then they are there again the next time
            if taken:
                self._sync()
            for folder in taken:
                for name in (METRICS_FILE, DETECTIONS_FILE):
                    (self._shared / "results" / folder.relative_to(results).as_posix() / name).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)

    def other_is_there(self) -> bool:
        """Whether there is a command of the other side."""
        return is_held(self._lock) if self._lease is None else self._lease.is_held()

    def _is_taken(self, key: str) -> bool:
        return (self._shared / "claims" / self._other / key).exists() and self.other_is_there()


@contextmanager
def following(run: RunFolder, what: str) -> Iterator[Callable[[], None]]:
    """Be the one follower of a run in the block.

    Args:
        run: the run.
        what: is done, for messages.

    Yields:
        What is to be called every few seconds.

    Raises:
        UserError: another command follows it.
    """
    if run.store is None:
        with held(run.followed / "lock", what):
            yield lambda: None
        return
    lease = Lease(run.store / "followed" / LEASE, what)
    lease.take(None)
    try:
        yield lease.renew
    finally:
        with suppress(StoreError):  # it is over when it has not been counted on
            lease.give_back()
