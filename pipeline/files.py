"""Writing files: whole or not at all, so that they survive a killed process and a power cut; one writer at a time."""

import errno
import fcntl
import hashlib
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from pipeline.errors import FullDiskError, UserError
from pipeline.log import get_logger
from pipeline.store import Place, StorePath

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOOKS, LOOK_SECONDS = 4, 0.05
"""How often, and with what time between, a lock is found locked before another process counts as its holder."""

logger = get_logger(__name__)


def make_folder(path: Path, mend: str = "choose another name") -> None:
    """Make a folder that the user named for results, with those above it, unless it is there.

    Args:
        path: the folder.
        mend: what to do where it cannot be made, for the message.

    Raises:
        UserError: it cannot be made, or nothing can be written in it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made a folder ({error.strerror}); {mend}") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"{path}: nothing can be written in this folder; {mend}")


def make_own_folder(path: Path, key: str) -> None:
    """Make a folder of this user's alone, with those above it: nobody else can put anything into it.

    Args:
        path: the folder, perhaps in one that all users write.
        key: what says that it is somewhere else, for messages.

    Raises:
        UserError: it cannot be made, or is another user's.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be made a folder ({error.strerror}); set {key}") from error
    if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path}: it is another user's, who could change what is in it; set {key}")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        what: what it is, for messages.

    Raises:
        UserError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the {what}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: the {what} is not JSON ({error})") from error


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """Write a JSON file, and its folder when missing; see `write_whole`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(content, indent=indent) + "\n").encode())


def write_whole(path: Place, content: bytes) -> None:
    """Write a file to a temporary name, flush it to the disk and rename it; nothing is left when that fails."""
    if isinstance(path, StorePath):
        path.write_bytes(content)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sha256_of(path: Place) -> str:
    """Hex sha256 of a file, which is read piece by piece."""
    if isinstance(path, StorePath):
        digest = hashlib.sha256()
        for block in path.blocks():
            digest.update(block)
        return digest.hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begin_to_sync(file: BinaryIO, begin: int) -> None:
    """Have the system write to the disk what was written to a file from there on, without waiting for it.

    The advice that a range is not needed any more begins its writeback; pages that are not on the disk yet stay.
    """
    file.flush()
    os.posix_fadvise(file.fileno(), begin, file.tell() - begin, os.POSIX_FADV_DONTNEED)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock among the processes that write here; it ends with its process, however that ends."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that writes here (%s)", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def held(path: Path, what: str, *, wait: bool = False, mend: str = "choose another name") -> Iterator[None]:
    """Hold a lock that says who holds it, and that a second process is refused; it ends with its process.

    Args:
        path: the file; made with its folder when missing. It may lie on a disk that several hosts share.
        what: is held, for messages.
        wait: wait for the lock instead.
        mend: what to do where its folder cannot be made, for the message.

    Raises:
        UserError: another process holds it, named by host, process and time.
    """
    file = _lock(path, what, wait, mend)
    with file:
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # there is more in it
                path.parent.rmdir()


def _lock(path: Path, what: str, wait: bool, mend: str) -> TextIO:
    """The locked file, empty."""
    looks = 0
    while True:
        make_folder(path.parent, mend)
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder, looks = _holder(file), looks + 1
            if not wait and looks < LOOKS:  # `is_held` of another process holds it for a moment
                file.close()
                time.sleep(LOOK_SECONDS)
                continue
            if not wait:
                file.close()
                mend = "wait for it, stop it, or use another name"
                raise UserError(f"{what} is running already{holder}: {mend}") from None
            logger.info("waiting for %s, which is running%s", what, holder)
            fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                return file
        file.close()  # whoever held it has removed it meanwhile


def is_held(path: Path) -> bool:
    """Whether a process, on whatever host of a shared disk, holds this lock of `held`."""
    try:
        with path.open("r+") as file:  # some network disks lock files that may be written alone
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _holder(file: TextIO) -> str:
    """Who wrote a lock, as the end of a message; empty while it is being written."""
    try:
        file.seek(0)
        held_by = json.load(file)
        return f" on {held_by['host']} since {held_by['since']}, process {held_by['pid']}"
    except (ValueError, KeyError, TypeError):
        return ""


@contextmanager
def disk_told(path: Path, key: str) -> Iterator[None]:
    """What the disk refuses is raised as `disk_error` of the path and the key."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error, key) from error


def disk_error(path: Place, error: OSError, key: str) -> Exception:
    """The user's error for a full disk or a folder that cannot be written, mended by `key`; others as they are."""
    if error.errno in NO_SPACE:
        return FullDiskError(f"{path}: no space left ({error.strerror}); free some, or write elsewhere with {key}")
    refused = PermissionError | NotADirectoryError | IsADirectoryError | FileExistsError
    if isinstance(error, refused) or error.errno in (errno.EROFS, errno.ENAMETOOLONG):
        return UserError(
            f"{error.filename2 or error.filename or path}: cannot be written ({error.strerror}); set {key}"
        )
    return error
