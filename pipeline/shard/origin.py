"""Where a split's images lie: a folder, a store, or a zip or tar archive, which is read in place."""

import os
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Protocol

from pipeline.data.images import MOST_BYTES, BadImageError, read_image_file, refuse_odd_file
from pipeline.errors import UserError, shown
from pipeline.store import Place, StorePath

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
"""Archives in which a file can be reached only by unpacking all before it."""

AT_ONCE, PART = 16, 1000
"""Threads that ask a disk for the sizes of files, and how many each asks for."""


class Images(Protocol):
    """The image files of a split, by the names that its annotation file gives them."""

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """Bytes of each file; None where it is missing, or cannot be an image."""

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: it is missing.
            BadImageError: it cannot be an image.
            OSError: it cannot be read.
        """

    def where(self, name: str) -> str:
        """What messages call a file."""

    def outside(self, names: Iterable[str]) -> str | None:
        """A name that leads out of here, if one does."""


def open_images(place: Place, mend: str = "set dataset.root or the split's images") -> Images:
    """The images of a folder or an archive.

    Args:
        place: where they lie.
        mend: what names another place, for messages.

    Raises:
        UserError: there is none, or it is packed so that it cannot be read in place.
    """
    if place.name.lower().endswith(PACKED):
        raise UserError(f"{place}: a file in such an archive cannot be read in place; unpack it, and {mend}")
    if place.suffix.lower() in (".zip", ".tar"):
        return _open_archive(place, mend)
    if isinstance(place, StorePath):
        return StoreImages(place)
    if not place.is_dir():
        raise UserError(f"{place}: no such folder of images; {mend}")
    return FolderImages(place)


@dataclass(frozen=True)
class FolderImages:
    """The files below a folder of this machine."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    def where(self, name: str) -> str:
        return str(self.folder / name)

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        wanted = list(names)
        parts = [wanted[start : start + PART] for start in range(0, len(wanted), PART)]
        with ThreadPoolExecutor(AT_ONCE) as pool:  # a disk of many hosts takes its time for each
            found = list(pool.map(lambda part: {name: self._size(name) for name in part}, parts))
        return {name: size for sizes in found for name, size in sizes.items()}

    def read(self, name: str) -> bytes:
        return read_image_file(self.folder / name)

    def outside(self, names: Iterable[str]) -> str | None:
        root = os.path.realpath(self.folder)
        real_folders: dict[str, str] = {}
        for name in names:
            path = os.path.join(root, name)
            folder = os.path.dirname(path)
            if folder not in real_folders:
                real_folders[folder] = os.path.realpath(folder)
            real = os.path.join(real_folders[folder], os.path.basename(path))
            if os.path.islink(path) or os.path.basename(path) == "..":
                real = os.path.realpath(path)
            if not real.startswith(os.path.join(root, "")):
                return name
        return None

    def _size(self, name: str) -> int | None:
        try:
            status = os.stat(self.folder / name)
            refuse_odd_file(status)
        except (OSError, ValueError, BadImageError):
            return None
        return status.st_size


@dataclass(frozen=True)
class StoreImages:
    """The files below a folder of a store."""

    folder: StorePath

    def __str__(self) -> str:
        return str(self.folder)

    def where(self, name: str) -> str:
        return str(self.folder / name)

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        found = self.folder.sizes(names)
        return {name: None if size is None or size > MOST_BYTES else size for name, size in found.items()}

    def read(self, name: str) -> bytes:
        if name.startswith("/"):
            raise BadImageError("image_unreadable", "an absolute name, which no folder of a store has")
        return read_stored(self.folder / posixpath.normpath(name))

    def outside(self, names: Iterable[str]) -> str | None:
        return _outside(names)


@dataclass(frozen=True)
class ArchiveImages:
    """The regular files of a zip or tar archive.

    A name may leave out a folder that all of them lie in, as `train2017/` in COCO's `train2017.zip`. Nothing is ever
    unpacked to a disk, so that links, devices and names such as `../x` in an archive reach nothing.
    """

    archive: Place
    stamp: int
    """Changes when the file does: a process that has it open may outlive the command."""

    def __str__(self) -> str:
        return str(self.archive)

    def where(self, name: str) -> str:
        return f"{self.archive}/{name}"

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        opened = _opened(self.archive, self.stamp)
        found = {name: opened.size(name) for name in names}
        return {name: None if size is None or size > MOST_BYTES else size for name, size in found.items()}

    def read(self, name: str) -> bytes:
        opened = _opened(self.archive, self.stamp)
        size = opened.size(name)
        if size is None:
            raise FileNotFoundError(name)
        _refuse_large(size)
        try:
            content = opened.read(name)
        except (ValueError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
            raise BadImageError("image_unreadable", f"its archive does not give it: {shown(error)}") from None
        if len(content) != size:
            raise BadImageError("image_unreadable", f"its archive gives {len(content)} of its {size} bytes")
        return content

    def outside(self, names: Iterable[str]) -> str | None:
        return _outside(names)


class _Archive:
    """An opened archive: its regular files by their names, and the one folder that holds them all."""

    def __init__(self, place: Place) -> None:
        self._file: IO[bytes] = place.open("rb") if isinstance(place, Path) else place.open()
        self._zip = zipfile.ZipFile(self._file) if place.suffix.lower() == ".zip" else None
        self._entries = dict(_entries(self._zip) if self._zip else _members(self._file))
        tops = {name.partition("/")[0] if "/" in name else "" for name in self._entries}
        self._top = f"{tops.pop()}/" if len(tops) == 1 else ""

    def size(self, name: str) -> int | None:
        entry = self._entry(name)
        return None if entry is None else entry[1]

    def read(self, name: str) -> bytes:
        entry = self._entry(name)
        if entry is None:
            raise FileNotFoundError(name)
        where, size = entry
        if self._zip is not None:
            return self._zip.read(where)
        self._file.seek(where)
        return self._file.read(size)

    def _entry(self, name: str) -> tuple[Any, int] | None:
        name = posixpath.normpath(name)
        return self._entries.get(name) or self._entries.get(self._top + name)


def _entries(archive: zipfile.ZipFile) -> Iterable[tuple[str, tuple[zipfile.ZipInfo, int]]]:
    for info in archive.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        if not info.is_dir() and kind in (0, stat.S_IFREG):
            yield posixpath.normpath(info.filename), (info, info.file_size)


def _members(file: IO[bytes]) -> Iterable[tuple[str, tuple[int, int]]]:
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them, a kilobyte each
            if member.isreg() and not member.issparse():
                yield posixpath.normpath(member.name), (member.offset_data, member.size)


def _open_archive(place: Place, mend: str) -> ArchiveImages:
    try:
        stamp = (place.size() or 0) if isinstance(place, StorePath) else place.stat().st_mtime_ns
        _opened(place, stamp)
    except FileNotFoundError:
        raise UserError(f"{place}: no such archive of images; {mend}") from None
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise UserError(f"{place}: this archive cannot be read ({shown(error)}); copy it again, or {mend}") from error
    return ArchiveImages(place, stamp)


def read_stored(file: StorePath) -> bytes:
    """The content of an image's file in a store; errors as of `Images.read`."""
    _refuse_large(file.size() or 0)
    return file.read_bytes()


def leads_out(name: str) -> bool:
    """Whether a name leads out of the folder that it stands in, links aside."""
    path = posixpath.normpath(name)
    return path.startswith(("/", "../")) or path == ".."


@lru_cache(maxsize=4)
def _opened(archive: Place, stamp: int) -> _Archive:
    """One for each process: the list of what is in it takes a second for 100,000 files."""
    return _Archive(archive)


def _refuse_large(size: int) -> None:
    if size > MOST_BYTES:
        raise BadImageError("image_unreadable", f"it has {size} bytes, more than the {MOST_BYTES} of an image")


def _outside(names: Iterable[str]) -> str | None:
    return next((name for name in names if leads_out(name)), None)
