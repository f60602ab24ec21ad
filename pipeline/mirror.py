"""Runs in a store: each process that works on one has a copy of its folder, which a `Mirror` keeps alike.

Every file has one side that writes it, the training workers or the driver, and the other side follows. A checkpoint is
there when its state.json is, which comes last and goes first; the points of the curves come before it.
"""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil

from pipeline.errors import StoreError, UserError
from pipeline.files import disk_told, held, make_own_folder, write_whole
from pipeline.lease import Lease
from pipeline.log import get_logger
from pipeline.run_folder import METRICS_FILE, RunFolder, copies_folder
from pipeline.store import StorePath

SYNC_SECONDS = 1.0
"""Between two looks at what the other side has written."""
PATIENCE_SECONDS = 900.0
"""For a store that takes no checkpoint: training ends after it, and goes on from the one before."""
PATIENCE_PAUSE = 5.0

CHECKPOINTS = "checkpoints/"
STATE = "state.json"
TRAINED = (CHECKPOINTS, "spool/train.jsonl", "profile/", "stacks/", "watch/")
"""What training's workers write; the driver writes everything else."""
FOLLOWED = "followed/"
"""What a follower and the driver say to each other in the store; see pipeline/evaluate/claims.py."""
LEASE = "lease.json"
"""In the store who works on the run, in a copy what it is known by."""
UNSHARED = ("lock", LEASE, "ray/")
"""What each side has for itself."""

COPY = "raydetr-run-"
"""Begins the name of the folder of a worker's copy, before the number of its process."""

Stamp = tuple[int, int]

logger = get_logger(__name__)


class Mirror:
    """Keeps a process's copy of a run's folder and the folder in its store alike, in a thread, until it is closed.

    Where the run has no store, there is nothing to do, and nothing is done.

    Args:
        run: the copy.
        writes: whether this side writes a file, by its name below the folder.
        reads: whether it follows one that the other side writes; None where it follows nothing.
        renew: called in between; what it raises is raised by `check`.
        is_sent: whether what lies in the copy is in the store.
    """

    def __init__(
        self,
        run: RunFolder,
        writes: Callable[[str], bool],
        reads: Callable[[str], bool] | None,
        renew: Callable[[], None] = lambda: None,
        *,
        is_sent: bool = False,
    ) -> None:
        self.run, self._writes, self._reads, self._renew = run, writes, reads, renew
        self._sent: dict[str, Stamp] = {}
        self._got: dict[str, Stamp] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mirror", daemon=True)
        self._error: Exception | None = None
        if is_sent:
            self._note("")
        if run.store is not None:
            self._thread.start()

    def sync(self) -> None:
        """Send what this side has written, then get what the other side has.

        Raises:
            StoreError: the store fails.
            UserError: as of `check`, or the disk of the copy is full.
        """
        self.check()
        if self.run.store is not None:
            with disk_told(self.run.path, "TMPDIR"), self._lock:
                self._send(self.run.store)
                self._get(self.run.store)

    def send_patiently(self) -> None:
        """Send a checkpoint and what came before it; where the store fails, again for `PATIENCE_SECONDS`.

        Of the older ones nothing but the state stays in the copy.

        Raises:
            StoreError: the store fails still.
        """
        end = time.monotonic() + PATIENCE_SECONDS
        while self.run.store is not None:
            try:
                with self._lock:
                    self._send(self.run.store)
                    self._thin()
            except StoreError as error:
                if time.monotonic() > end:
                    raise
                logger.warning("%s; training waits for it", error)
                time.sleep(PATIENCE_PAUSE)
            else:
                return

    def check(self) -> None:
        """Raise the error for which this side must work no longer, if there is one."""
        if self._error is not None:
            raise self._error

    def get_checkpoint(self, name: str) -> Path:
        """A checkpoint's folder in the copy, got from the store where it is not whole.

        Raises:
            StoreError: the store fails.
            UserError: it is not in the store, or the disk of the copy is full.
        """
        path = self.run.checkpoints / name
        if self.run.store is not None:
            with disk_told(self.run.path, "TMPDIR"), self._lock:
                get_checkpoint(self.run.store, name, path)
                self._note(CHECKPOINTS + name)
        return path

    def close(self) -> None:
        """Send the rest, and follow no longer.

        Raises:
            StoreError: the store fails: the rest is in the copy.
        """
        self._closed.set()
        if self.run.store is not None:
            self._thread.join()
            if self._error is None:
                with self._lock:
                    self._send(self.run.store)

    def _follow(self) -> None:
        was_away = False
        while not self._closed.wait(SYNC_SECONDS):
            try:
                self._renew()
                self.sync()
                was_away = False
            except StoreError as error:
                if not was_away:
                    logger.warning("%s; it is tried again until then", error)
                was_away = True
            except (UserError, OSError) as error:
                self._error = error
                return

    def _note(self, prefix: str) -> None:
        """What lies in the copy below a name is in the store."""
        self._sent |= {name: stamp for name, stamp in _files(self.run.path / prefix, prefix) if self._writes(name)}

    def _send(self, store: StorePath) -> None:
        there = {name: stamp for name, stamp in _files(self.run.path) if self._writes(name)}
        for name in sorted(there, key=_order):
            if self._sent.get(name) != there[name]:
                with suppress(FileNotFoundError):  # it has just been removed
                    (store / name).upload(self.run.path / name)
                    self._sent[name] = there[name]
        for name in self._sent.keys() - there.keys():
            if not name.startswith(CHECKPOINTS):
                (store / name).unlink()
            elif name.endswith(STATE):  # the copy may have had nothing else of it
                (store / name).unlink()
                for other in (store / name.removesuffix(STATE)).list():
                    (store / name.removesuffix(STATE) / other).unlink()
            del self._sent[name]

    def _thin(self) -> None:
        states = [name for name in self._sent if name.startswith(CHECKPOINTS) and name.endswith(STATE)]
        for name in sorted(states, key=lambda name: self._sent[name][1])[:-1]:
            for file in (self.run.path / name).parent.glob("*"):
                if file.name != STATE:
                    file.unlink(missing_ok=True)

    def _get(self, store: StorePath) -> None:
        if self._reads is None:
            return
        there = {name: stamp for name, stamp in store.stamps().items() if self._reads(name)}
        for name in sorted(there, key=_order):
            if self._got.get(name) == there[name]:
                continue
            with suppress(FileNotFoundError):  # it has just gone
                if not name.startswith(CHECKPOINTS):
                    get(store / name, self.run.path / name)
                elif name.endswith(STATE):
                    checkpoint = name.removeprefix(CHECKPOINTS).removesuffix(f"/{STATE}")
                    _fetch_checkpoint(store / CHECKPOINTS.rstrip("/") / checkpoint, self.run.checkpoints / checkpoint)
                self._got[name] = there[name]
        for name in self._got.keys() - there.keys():
            path = self.run.path / name
            if name.startswith(CHECKPOINTS) and name.endswith(STATE):
                _remove(path.parent)
            elif not name.startswith(CHECKPOINTS):
                path.unlink(missing_ok=True)
            del self._got[name]


@contextmanager
def driver_mirror(run: RunFolder, what: str, *, wait: bool = False, mend: str = "set runs") -> Iterator[Mirror]:
    """The driver's copy of a run in the block, which one command at a time works on; alike at the beginning.

    Args:
        run: the copy of a run in a store, or the folder of any other.
        what: is worked on, for messages.
        wait: for another command that works on it, instead of being refused.
        mend: what to do where the folder cannot be made, for the message.

    Raises:
        UserError: another command works on it, or the folder cannot be made.
        StoreError: the store fails.
    """
    if run.store is not None:
        make_own_folder(copies_folder(), "TMPDIR")
    with held(run.lock, what, wait=wait, mend=mend):
        lease = None
        if run.store is not None:
            lease = Lease(run.store / LEASE, what)
            _take(lease, run, run.store, wait)
        mirror = Mirror(run, _of_driver, _for_driver, lease.renew if lease else lambda: None)
        try:
            mirror.sync()
            yield mirror
        finally:
            try:
                mirror.close()
                if lease is not None and mirror._error is None:
                    lease.give_back()
            except StoreError as error:
                logger.warning(
                    "%s. What it has not got is in %s, for the next command on this machine", error, run.path
                )


def _take(lease: Lease, run: RunFolder, store: StorePath, wait: bool) -> None:
    """Take the lease, with a copy that has all that the driver's side had in the end."""
    file = run.path / LEASE
    token = file.read_text(encoding="utf-8") if file.exists() else None
    if lease.take(token, wait=wait):
        return
    file.unlink(missing_ok=True)
    for path in run.path.iterdir():
        if path != run.lock:
            _remove(path)
    for name in store.stamps():
        if _of_driver(name):
            get(store / name, run.path / name)
    write_whole(file, lease.token.encode())


@contextmanager
def worker_mirror(run: RunFolder, rank: int) -> Iterator[Mirror]:
    """A training worker's copy of a run in the block, with what was written by one of its rank before.

    Rank 0 has the state of every checkpoint in it; `get_checkpoint` gets the rest.
    """
    if run.store is None:
        yield Mirror(run, lambda name: False, None)
        return
    _remove_left()
    with tempfile.TemporaryDirectory(prefix=f"{COPY}{os.getpid()}-") as folder:
        copy = replace(run, path=Path(folder))
        own = f"rank-{rank}."

        def writes(name: str) -> bool:
            is_shared = name.startswith((CHECKPOINTS, "spool/"))
            return _of_workers(name) and (own in name or (is_shared and rank == 0))

        def reads(name: str) -> bool:
            is_score = name.startswith(("evaluate/checkpoint-", "evaluate/subset-")) and name.endswith(METRICS_FILE)
            return name == "stop" or name.startswith("parent/") or is_score

        for name in run.store.stamps():
            if writes(name) and (not name.startswith(CHECKPOINTS) or name.endswith(STATE)):
                get(run.store / name, copy.path / name)
        mirror = Mirror(copy, writes, reads if rank == 0 else None, is_sent=True)
        mirror.sync()
        try:
            yield mirror
        finally:
            mirror.close()


@contextmanager
def checkpoint_here(run: RunFolder, path: Path) -> Iterator[Path]:
    """A checkpoint in the block, on a host that may have nothing of the run; other folders are where they are.

    Raises:
        StoreError: the store fails.
        UserError: it is not in the store.
    """
    if run.store is None or path.parent != run.checkpoints:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="raydetr-checkpoint-") as folder:
        copy = Path(folder, path.name)
        get_checkpoint(run.store, path.name, copy)
        yield copy


def checkpoints_in_store(run: RunFolder) -> list[Path]:
    """Where a run's checkpoints would lie in a copy, oldest first, for `checkpoint_here`."""
    assert run.store is not None
    names = (run.store / CHECKPOINTS.rstrip("/")).list()
    steps = [name.removeprefix("checkpoint-").removesuffix(f"/{STATE}") for name in names if name.endswith(STATE)]
    return [run.checkpoints / f"checkpoint-{step}" for step in sorted(int(step) for step in steps if step.isdigit())]


@contextmanager
def results_here(run: RunFolder) -> Iterator[Path]:
    """The folder of a run in the block, on a host that may have nothing of it; of one in a store, with its scores.

    Raises:
        StoreError: the store fails.
    """
    if run.store is None:
        yield run.path
        return
    with tempfile.TemporaryDirectory(prefix="raydetr-results-") as folder:
        for name in (run.store / run.evaluation.name).list():
            get(run.store / run.evaluation.name / name, Path(folder, run.evaluation.name, name))
        yield Path(folder)


def get(source: StorePath, path: Path) -> None:
    """A file of a store, whole or not at all. Raises FileNotFoundError where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        source.download(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def get_checkpoint(store: StorePath, name: str, path: Path) -> None:
    """A checkpoint of a run's folder in a store, whole, unless it is there.

    Raises:
        UserError: it is not in the store, or not whole.
    """
    source = store / CHECKPOINTS.rstrip("/") / name
    try:
        _fetch_checkpoint(source, path)
    except FileNotFoundError:
        raise UserError(f"{source}: is no whole checkpoint; give the command again") from None


def _fetch_checkpoint(source: StorePath, path: Path) -> None:
    state, names = (source / STATE).read_bytes(), set(source.list())
    there = {file.name for file in path.iterdir()} if path.exists() else set()
    if names <= there and (path / STATE).read_bytes() == state:
        return
    temporary = path.with_name(f"{path.name}.tmp")
    _remove(temporary)
    temporary.mkdir(parents=True)
    for file in names:
        (source / file).download(temporary / file)
    _remove(path)
    temporary.rename(path)


def _remove_left() -> None:
    """Remove the copies of workers that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{COPY}*"):
        if not psutil.pid_exists(int(path.name.removeprefix(COPY).partition("-")[0])):
            _remove(path)


def _for_driver(name: str) -> bool:
    return _of_workers(name) or name.startswith(f"{FOLLOWED}results/")


def _of_workers(name: str) -> bool:
    return name.startswith(TRAINED)


def _of_driver(name: str) -> bool:
    return not name.startswith((*TRAINED, FOLLOWED, *UNSHARED))


def _order(name: str) -> tuple[bool, bool, str]:
    """Points come before the checkpoints after them, and state.json last of each."""
    return name.startswith(CHECKPOINTS), name.endswith(STATE), name


def _files(folder: Path, below: str = "") -> Iterator[tuple[str, Stamp]]:
    """The finished files below a folder by name, each with what changes when it is written."""
    with suppress(FileNotFoundError, NotADirectoryError):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.name.startswith(".") or entry.name.endswith(".tmp"):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path), name)
            else:
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    yield name, (status.st_size, status.st_mtime_ns)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
