"""Whole files of a store, kept on this machine and shared by its processes.

A copy is kept under the sha256 that its manifest gives, so that it is what it has to be whatever its address, and two
runs share it. The least recently used go when there is no room. One process fetches a file and the others wait for it:
the unfinished copy is the lock.
"""

import fcntl
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.sections import ShardsSection
from pipeline.errors import UserError
from pipeline.files import NO_SPACE, disk_error, make_own_folder, sha256_of
from pipeline.log import get_logger
from pipeline.store import StorePath, size_of

PART = ".part"
TRIES = 3
"""Copies of a file that are taken until one has its sha256."""

logger = get_logger(__name__)


@dataclass(frozen=True)
class Cache:
    """A folder of copies.

    Args:
        folder: made when it is needed; None is one of this user's in the machine's folder of temporary files.
        max_bytes: of all copies. Those that are being fetched come on top.
    """

    folder: Path | None = None
    max_bytes: int = 100 * 2**30

    def fetch(self, source: StorePath, sha256: str, size: int | None, *, wait: bool = True) -> Path:
        """The copy of a file, fetched from its store where there is none.

        Args:
            source: the file.
            sha256: what it has to be, in hex.
            size: its bytes; None where only the store knows.
            wait: for another process that fetches it now; else the copy may not be there.

        Raises:
            UserError: the store does not give it, or other bytes; or there is no space for it.
        """
        folder = self._made()
        copy = folder / sha256
        try:
            while not copy.exists():
                with _locked(folder / f"{sha256}{PART}", wait) as part:
                    if part is None:
                        if wait:
                            continue
                        break
                    if copy.exists():
                        part.unlink()
                        break
                    self._fill(part, source, sha256, size or source.size() or 0)
                    part.replace(copy)
            with suppress(FileNotFoundError):
                os.utime(copy)
        except OSError as error:
            raise disk_error(folder, error, "shards.cache") from error
        return copy

    def open(self, source: StorePath, sha256: str, size: int) -> int:
        """A descriptor of the copy, which stays readable when the copy has to go; errors as of `fetch`."""
        while True:
            copy = self.fetch(source, sha256, size)
            with suppress(FileNotFoundError):  # it had to go at once, for another process
                return os.open(copy, os.O_RDONLY | os.O_CLOEXEC)

    def _made(self) -> Path:
        own = Path(tempfile.gettempdir()) / f"raydetr-cache-{os.getuid()}"
        folder = self.folder or own
        make_own_folder(folder, "shards.cache")
        return folder

    def _fill(self, part: Path, source: StorePath, sha256: str, size: int) -> None:
        self._free(self._used() + size - self.max_bytes)
        for _ in range(TRIES):
            try:
                source.download(part)
            except FileNotFoundError:
                part.unlink()
                raise UserError(f"{source}: it is not in its store; shard again") from None
            except OSError as error:
                os.truncate(part, 0)
                if error.errno not in NO_SPACE or not self._free(size):
                    raise
                continue
            if sha256_of(part) == sha256:
                return
            logger.warning("%s: what came is not what its manifest says; fetching it again", source)
        part.unlink()
        raise UserError(f"{source}: its sha256 is not the manifest's: the file has changed in its store; shard again")

    def _used(self) -> int:
        return sum(size_of(copy) or 0 for copy in self._made().iterdir())

    def _free(self, count: int) -> bool:
        """Removes the least recently used copies until so many bytes are free; whether any had to go."""
        freed = 0
        for copy in sorted(self._made().iterdir(), key=_used_at):
            if freed >= count:
                break
            size = size_of(copy) or 0
            if copy.suffix == PART and not _is_left(copy):
                continue
            copy.unlink(missing_ok=True)
            freed += size
        return freed > 0


DEFAULT_CACHE = Cache()


def cache_of(shards: ShardsSection) -> Cache:
    """The cache that is configured."""
    return Cache(Path(shards.cache).resolve() if shards.cache else None, shards.cache_bytes)


class FetchAhead:
    """Fetches in the background what is needed soon. What fails is told where it is needed.

    Args:
        fetch: fetches the file of a number; called in a thread of its own.
    """

    def __init__(self, fetch: Callable[[int], object]) -> None:
        self._fetch = fetch
        self._wanted: list[int] = []
        self._changed = threading.Condition()
        self._is_open = True
        threading.Thread(target=self._run, name="fetch-ahead", daemon=True).start()

    def want(self, numbers: Sequence[int]) -> None:
        """What is needed from now on, the first first; what was wanted before is no more."""
        with self._changed:
            self._wanted = list(numbers)
            self._changed.notify()

    def close(self) -> None:
        """Begin no more."""
        with self._changed:
            self._is_open = False
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or not self._is_open)
                if not self._is_open:
                    return
                number = self._wanted.pop(0)
            with suppress(UserError, OSError):
                self._fetch(number)


@contextmanager
def _locked(path: Path, wait: bool) -> Iterator[Path | None]:
    """An unfinished copy that this process alone fills now; None where another does, or did while this one waited."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        try:
            is_same = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except FileNotFoundError:
            is_same = False
        yield path if is_same else None


def _is_left(part: Path) -> bool:
    """Whether nobody fills an unfinished copy."""
    with suppress(OSError), part.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _used_at(copy: Path) -> float:
    with suppress(FileNotFoundError):
        return copy.stat().st_mtime
    return 0.0
