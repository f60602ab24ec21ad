"""A shard's tar as it is written: members at known offsets, the sha256 of the whole.

Every header is that of `tarfile` in its ustar format, with nothing in it that depends on who writes or when. Only its
name, size and checksum differ from member to member, so they are put into one that was made before.
"""

import hashlib
import tarfile
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO, Self

from pipeline.data.index import Member
from pipeline.files import begin_to_sync

BLOCK = tarfile.BLOCKSIZE
WRITE_BYTES, BUFFERS = 2**20, 4
"""Bytes that are given to the system at once, and how many of those are there before the next member waits."""
NAME, SIZE, CHECKSUM = slice(0, 100), slice(124, 136), slice(148, 156)
"""Fields of a header (POSIX ustar)."""


def _blank_header() -> bytearray:
    """A member's header without name and size; its checksum's field holds spaces, as it counts in the sum."""
    member = tarfile.TarInfo()
    member.uname = member.gname = "raydetr"
    header = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    header[CHECKSUM] = b" " * 8
    header[SIZE] = bytes(12)
    return header


BLANK = _blank_header()
BLANK_SUM = sum(BLANK)


def tar_size(content: int) -> int:
    """Bytes that a member of so many takes in a tar."""
    return BLOCK + content + -content % BLOCK


def header_of(name: str, size: int) -> bytes:
    """The header of a file's member: mode 0644, owner and group `raydetr` without numbers, time 0.

    Args:
        name: at most 100 ASCII characters.
        size: below 8 GiB.
    """
    told, digits = name.encode("ascii").ljust(100, b"\0"), b"%011o\0" % size
    assert len(told) == 100
    assert len(digits) == 12
    header = BLANK.copy()
    header[NAME], header[SIZE] = told, digits
    header[CHECKSUM] = b"%06o\0 " % (BLANK_SUM + sum(told) + sum(digits))
    return bytes(header)


class ShardTar:
    """Writes members to a file and ends the tar when left without an exception.

    A thread takes the checksum of the whole and writes: both let go of the interpreter, which reads and checks the
    next images meanwhile. The disk begins at once, so that little is left to wait for at the end.

    Args:
        file: on a disk.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._buffer, self._filled = bytearray(WRITE_BYTES), 0
        self._writer = ThreadPoolExecutor(1)
        self._writes: deque[Future[bytearray]] = deque()
        self.size = 0

    def add(self, name: str, content: bytes) -> Member:
        """Append a file; where its content is, and its CRC-32.

        Raises:
            OSError: what was added before cannot be written.
        """
        member = Member(self.size + BLOCK, len(content), zlib.crc32(content))
        for piece in (header_of(name, len(content)), content, bytes(-len(content) % BLOCK)):
            self._append(piece)
        return member

    @property
    def sha256(self) -> str:
        """Hex digest of what was written, once the tar is ended."""
        return self._digest.hexdigest()

    def _append(self, piece: bytes) -> None:
        self.size += len(piece)
        rest = memoryview(piece)
        while rest:
            part, rest = rest[: WRITE_BYTES - self._filled], rest[WRITE_BYTES - self._filled :]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == WRITE_BYTES:
                self._hand_over()

    def _hand_over(self) -> None:
        self._writes.append(self._writer.submit(self._write, self._buffer, self._filled))
        is_free = len(self._writes) == BUFFERS  # memory that is used again costs less than new memory
        self._buffer, self._filled = self._writes.popleft().result() if is_free else bytearray(WRITE_BYTES), 0

    def _write(self, buffer: bytearray, filled: int) -> bytearray:
        content = memoryview(buffer)[:filled]
        self._digest.update(content)
        begin = self._file.tell()
        self._file.write(content)
        begin_to_sync(self._file, begin)
        return buffer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._writer:
            if kind is None:
                end = self.size + 2 * BLOCK
                self._append(bytes(end + -end % tarfile.RECORDSIZE - self.size))
                self._hand_over()
                for write in self._writes:
                    write.result()
