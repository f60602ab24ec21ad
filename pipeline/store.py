"""Paths in a store: `s3://`, `gs://`, `abfs://`, `hdfs://` through pyarrow.fs, `http(s)://` through fsspec.

A `StorePath` has the part of pathlib's interface that the house needs, so that a folder may be either, a `Place`. A
file is there whole or not at all. What a store refuses for a while is tried again with growing pauses, and then told by
one `StoreError`. Credentials come from the environment or the files of the store's own tools, never from the address.
"""

import io
import posixpath
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from pipeline.errors import StoreError, UserError, shown
from pipeline.log import get_logger

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "http", "https")
WEB = ("http://", "https://")
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds between the tries of a request."""
CHUNK = 16 * 2**20
"""Bytes of a request; one that is cut is asked for again, not the whole file."""
AT_ONCE = 32
"""Requests at once where a store cannot list a folder."""
FINAL = (
    "ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "PERMISSION_DENIED",
    "401, message=", "403, message=",
)  # fmt: skip
"""What is in answers that another try does not change."""
SILENCE = 30.0
"""Seconds that a web server may take to accept a connection, or to send the next bytes."""
GONE = (404, 410)
"""What a web server answers where there is no such file."""

Result = TypeVar("Result")

logger = get_logger(__name__)


@dataclass(frozen=True)
class StorePath:
    """A file or a folder in a store.

    Args:
        root: address of a folder. Options of `pyarrow.fs.FileSystem.from_uri` may follow a `?`.
        below: path under it, with slashes.
    """

    root: str
    below: str = ""

    def __str__(self) -> str:
        return posixpath.join(self.root.partition("?")[0].rstrip("/"), self.below).rstrip("/")

    def __truediv__(self, name: str) -> "StorePath":
        return StorePath(self.root, posixpath.join(self.below, name))

    @property
    def name(self) -> str:
        """The last part."""
        return posixpath.basename(str(self))

    @property
    def parent(self) -> "StorePath":
        """The folder that the last part is in."""
        if self.below:
            return StorePath(self.root, posixpath.dirname(self.below))
        address, mark, options = self.root.partition("?")
        return StorePath(posixpath.dirname(address) + mark + options)

    @property
    def suffix(self) -> str:
        """The extension of the last part, with its dot."""
        return posixpath.splitext(self.name)[1]

    def with_suffix(self, suffix: str) -> "StorePath":
        """The path with another extension."""
        return StorePath(self.root, posixpath.splitext(self.below)[0] + suffix)

    def size(self) -> int | None:
        """Bytes of the file; None where there is none."""
        if self._is_web:
            return self._try("looked at", self._size_in_web)
        info = self._try("looked at", lambda: self._files.get_file_info(self._path))
        return int(info.size or 0) if info.is_file else None

    def _size_in_web(self) -> int | None:
        try:
            return int(self._files.handler.fs.info(self._path)["size"] or 0)
        except FileNotFoundError as error:  # fsspec says it as well of a server that is away, or fails
            if isinstance(error.__cause__, FileNotFoundError) or getattr(error.__cause__, "status", None) in GONE:
                return None
            raise OSError(f"no answer: {error.__cause__}") from error

    def exists(self) -> bool:
        """Whether the file is there."""
        return self.size() is not None

    def read_bytes(self) -> bytes:
        """The whole file. Raises FileNotFoundError where there is none, UserError where it cannot be read."""
        content = io.BytesIO()
        self._copy_to(content)
        return content.getvalue()

    def download(self, path: Path) -> None:
        """Copy the file to one of this machine, which is not whole where this is cut off; errors as of `read_bytes`."""
        with path.open("wb") as file:
            self._copy_to(file)

    def open(self) -> Any:
        """The file for reading here and there: `read`, `seek` and `tell`. Errors as of `read_bytes`."""
        return io.BufferedReader(_Blocks(self), 2**16)

    def write_bytes(self, content: bytes) -> None:
        """Write the whole file."""

        def write() -> None:
            with self._files.open_output_stream(self._path, compression=None) as stream:
                stream.write(content)

        self._try("written", write)

    def upload(self, path: Path) -> None:
        """Copy a file of this machine here."""

        def write() -> None:
            with path.open("rb") as file, self._files.open_output_stream(self._path, compression=None) as stream:
                stream.upload(file, CHUNK)

        self._try("written", write)

    def unlink(self, missing_ok: bool = True) -> None:
        """Remove the file, if it is there; a store does not tell whether it was."""

        def remove() -> None:
            with suppress(FileNotFoundError):
                self._files.delete_file(self._path)

        self._try("removed", remove)

    def list(self) -> dict[str, int]:
        """The sizes of all files in the folder and those below it, by their paths under it."""
        return {name: size for name, (size, _) in self.stamps().items()}

    def stamps(self) -> dict[str, tuple[int, int]]:
        """What changes when one of the files of `list` is written anew, by its path: its size, and its time in ns."""
        import pyarrow.fs

        def files() -> Any:
            return self._files.get_file_info(pyarrow.fs.FileSelector(self._path, recursive=True, allow_not_found=True))

        found = self._try("listed", files)
        start = len(self._path.rstrip("/")) + 1
        return {info.path[start:]: (int(info.size), int(info.mtime_ns or 0)) for info in found if info.is_file}

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """The sizes of some files under this folder; None for one that is not there."""
        if not self._is_web:
            found = self.list()
            return {name: found.get(posixpath.normpath(name)) for name in names}
        wanted = list(names)
        with ThreadPoolExecutor(AT_ONCE) as pool:  # a web server lists nothing
            return dict(zip(wanted, pool.map(lambda name: (self / name).size(), wanted), strict=True))

    @property
    def _is_web(self) -> bool:
        return self.root.startswith(WEB)

    @property
    def _files(self) -> Any:
        return _opened(self.root)[0]

    @property
    def _path(self) -> str:
        base = _opened(self.root)[1]
        if not self.below:
            return base
        if not self._is_web:
            return posixpath.join(base, self.below)
        address, mark, options = base.partition("?")
        return posixpath.join(address, quote(self.below)) + mark + options

    def _copy_to(self, file: Any) -> None:
        for block in self.blocks():
            file.write(block)

    def blocks(self) -> Iterator[bytes]:
        """The content of the file, piece by piece; errors as of `read_bytes`."""
        if self._is_web:  # where a server may give nothing but whole files
            yield self._try("read", lambda: self._files.handler.fs.cat_file(self._path))
            return
        source = self._try("read", lambda: self._files.open_input_file(self._path))
        with source:
            size, offset = self._try("read", source.size), 0
            while offset < size:
                block = self.read_at(source, offset, min(CHUNK, size - offset))
                yield block
                offset += len(block)

    def read_at(self, source: Any, offset: int, count: int) -> bytes:
        """Some bytes of the opened file, all of them."""

        def read() -> bytes:
            block = bytes(source.read_at(count, offset))
            if len(block) != count:
                raise OSError(f"it ended after {offset + len(block)} bytes")
            return block

        return self._try("read", read)

    def _try(self, what: str, call: Callable[[], Result]) -> Result:
        """The result of a call, which is made again where the store fails."""
        options = self.root.partition("?")[2]
        for pause in (*PAUSES, None):
            try:
                return call()
            except FileNotFoundError:
                raise
            except _errors() as error:
                told = " ".join(str(error).split()) or type(error).__name__
                if options:  # they may be a token
                    told = told.replace(f"?{options}", "")
                if pause is None or any(code in told for code in FINAL):
                    raise StoreError(
                        f"{self}: cannot be {what} in its store ({shown(told, 300)}); check the address, the "
                        "credentials and the network, then give the command again"
                    ) from error
                logger.info("%s: cannot be %s (%s); again in %g s", self, what, shown(told, 200), pause)
                time.sleep(pause)
        raise AssertionError


Place = Path | StorePath
"""A folder or a file of this machine, or one in a store."""


def place(text: str) -> Place:
    """What a setting names: a path, or an address of `SCHEMES`. `file://` means a path.

    Raises:
        ValueError: what it must be instead.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if scheme == "file":
        return Path(unquote(rest))
    if scheme not in SCHEMES:
        raise ValueError(f"must be a path or an address that begins with one of {', '.join(SCHEMES)}")
    if ":" in rest.rpartition("@")[0].partition("/")[0]:
        raise ValueError("must have no password: the credentials stand in the environment or in the store's own files")
    if not rest.strip("/"):
        raise ValueError("must name a bucket or a host")
    return StorePath(text)


def absolute(text: str) -> Place:
    """What a setting names, whichever folder a process is in."""
    named = place(text)
    return named.resolve() if isinstance(named, Path) else named


def size_of(path: Place) -> int | None:
    """Bytes of a file; None where there is none."""
    if isinstance(path, StorePath):
        return path.size()
    try:
        return path.stat().st_size
    except OSError:
        return None


class _Blocks(io.RawIOBase):
    """A file in a store as Python's raw files are, for readers that look here and there."""

    def __init__(self, path: StorePath) -> None:
        self._of = path
        self._source = path._try("read", lambda: path._files.open_input_file(path._path))
        self._size = int(path._try("read", self._source.size))
        self._offset = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._offset = offset + (0, self._offset, self._size)[whence]
        return self._offset

    def tell(self) -> int:
        return self._offset

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._offset))
        if count:
            buffer[:count] = self._of.read_at(self._source, self._offset, count)
            self._offset += count
        return count


@lru_cache(maxsize=16)
def _opened(root: str) -> tuple[Any, str]:
    """The file system of an address, and the path there. pyarrow takes a while to import, and few need it."""
    import pyarrow.fs

    if root.startswith(WEB):
        import aiohttp
        import fsspec

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
        web = fsspec.filesystem("http", client_kwargs={"timeout": timeout})
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(web)), root.rstrip("/")
    try:
        files, path = pyarrow.fs.FileSystem.from_uri(root)
    except (ValueError, NotImplementedError) as error:  # ArrowInvalid is a ValueError
        raise UserError(f"{root.partition('?')[0]}: not an address of a store ({shown(error, 300)})") from error
    return files, path


@lru_cache(maxsize=1)
def _errors() -> tuple[type[BaseException], ...]:
    """What a store's client raises where a request fails."""
    import asyncio

    import aiohttp
    import pyarrow

    return OSError, pyarrow.ArrowException, aiohttp.ClientError, asyncio.TimeoutError
