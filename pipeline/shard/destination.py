"""Where shards are written: a folder on a disk, or one in a store.

On a disk all is written into a hidden folder beside the final one, which is renamed when it is whole. A store knows no
renaming and no locks: files are copied to where they stay, and whoever else writes there writes the same bytes.
"""

import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.files import locked, sha256_of, sync
from pipeline.store import Place


@contextmanager
def alone(out: Place, split: str) -> Iterator[None]:
    """Holds a lock among the commands that write this split. A store has none: there they write the same bytes."""
    if not isinstance(out, Path):
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / f".{split}.lock"):
        yield


def unfinished_of(folder: Place) -> Place:
    """Where the files of a folder are written before all of them are there."""
    return folder.with_name(f".{folder.name}.partial") if isinstance(folder, Path) else folder


def publish(unfinished: Place, folder: Place) -> None:
    """Makes what is whole the folder."""
    if isinstance(unfinished, Path) and isinstance(folder, Path):
        unfinished.replace(folder)
        sync(folder.parent)


@contextmanager
def scratch(path: Place) -> Iterator[Path]:
    """A temporary name on this machine for a file that `move` takes to its path; what is left there is removed.

    It is this call's own: a task whose command was killed may still write the same file.
    """
    folder = path.parent if isinstance(path, Path) else Path(tempfile.gettempdir())
    temporary = folder / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def move(temporary: Path, path: Place) -> None:
    """Renames a file, or copies it into the store."""
    if isinstance(path, Path):
        temporary.replace(path)
    else:
        path.upload(temporary)


def is_still(path: Place, size: int, sha256: str) -> bool:
    """Whether a file is the one that was written, by its sha256.

    In a store it is there whole or not at all, and all would have to be fetched: its size has to do.
    """
    return sha256_of(path) == sha256 if isinstance(path, Path) else path.size() == size


def names_in(folder: Place) -> list[str]:
    """The files of a folder; none where it is not there."""
    if isinstance(folder, Path):
        return [path.name for path in folder.iterdir()] if folder.exists() else []
    return list(folder.list())


def remove(folder: Place, names: Iterable[str]) -> None:
    """Removes files of a folder."""
    for name in names:
        (folder / name).unlink(missing_ok=True)


def clear(folder: Place) -> None:
    """Removes a folder with all that is in it."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        remove(folder, folder.list())


def begin(folder: Place) -> None:
    """Makes a folder that is empty, whatever was there."""
    clear(folder)
    if isinstance(folder, Path):
        folder.mkdir()
