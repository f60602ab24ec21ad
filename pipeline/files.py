"""Writing a file whole or not at all, so that it survives a killed process and a power cut."""

import json
import os
from pathlib import Path
from typing import Any

from pipeline.errors import UserError


def make_folder(path: Path) -> None:
    """Make a folder that the user named for results, with those above it, unless it is there.

    Raises:
        UserError: it cannot be made, or nothing can be written in it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made a folder ({error.strerror}); choose another name") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"{path}: nothing can be written in this folder; choose another one")


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """Write a JSON file, and its folder when missing; see `write_whole`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(content, indent=indent) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file to a temporary name, flush it to the disk and rename it; nothing is left when that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
