"""A COCO document: its file read, and what an entry of it must be. Shards and scores both read it here.

What only one of them needs stands with it: `shard/coco.py` cleans for training, `evaluate/documents.py` keeps whatever
pycocotools counts.
"""

import gc
import gzip
import json
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import msgspec
import pydantic_core

from pipeline.errors import UserError, shown
from pipeline.store import Place

GZIP = b"\x1f\x8b"
GREATEST_ID = 2**53 - 1
"""Every id up to this is a float as well, which is what pycocotools makes of it."""
GREATEST_NUMBER = 1e100
"""Coordinates, areas and scores beyond this are as good as infinite: their products would be."""
MOST_PIXELS = 10**9
IMAGE_IDS = 10**12

Check = Callable[[Any], str | None]
"""Says what a value must be, or None where it is that."""


def is_whole(value: Any) -> bool:
    """Whether a value of JSON is a whole number that an id can be: not true or false, perhaps written 7.0."""
    return (type(value) is int or (isinstance(value, float) and value.is_integer())) and abs(value) <= GREATEST_ID


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number (true and false are none), be it infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether a value of JSON is a number to reckon with."""
    return is_number(value) and abs(value) <= GREATEST_NUMBER  # which NaN is not


def crowd(value: Any) -> int | None:
    """`iscrowd` as 0 or 1: true and false, null and the texts "0" and "1" are read as meant; None for all else."""
    if value is None or value == "0":
        return 0
    if value == "1":
        return 1
    return int(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def whole(value: Any) -> str | None:
    """Check of an id."""
    return None if is_whole(value) else "a whole number"


def image_id(value: Any) -> str | None:
    """Check of an image's id, whose digits name a sample."""
    if not is_whole(value):
        return "a whole number"
    return None if 0 <= value < IMAGE_IDS else "in 0..10^12-1 (12 digits name a sample)"


def pixels(value: Any) -> str | None:
    """Check of a side of an image."""
    if not is_whole(value):
        return "a whole number"
    return None if 1 <= value <= MOST_PIXELS else "at least 1 pixel and at most 10^9"


def text(value: Any) -> str | None:
    """Check of a name."""
    if not isinstance(value, str) or not value:
        return "text"
    return None if _is_utf8(value) and "\0" not in value else "text that UTF-8 can write: rename the file or category"


def identifier(value: Any) -> str | None:
    """Check of an id that is only compared: a whole number or text."""
    return None if is_whole(value) or (isinstance(value, str) and _is_utf8(value)) else "a whole number"


def anything(value: Any) -> None:
    """Check of a value whose rules come later."""


def read_document(path: Place, what: str, mend: str = "") -> tuple[bytes, Any]:
    """Read a JSON file, packed by gzip or not.

    Args:
        path: the file.
        what: what it is, for messages.
        mend: ends the message where it cannot be read.

    Returns:
        The content, unpacked, and the value that it holds.

    Raises:
        UserError: it cannot be read, or is not JSON.
    """
    content = _unpacked(path, what, mend)
    return content, _document(path, what, content)


def _unpacked(path: Place, what: str, mend: str) -> bytes:
    try:
        if isinstance(path, Path) and stat.S_ISCHR(path.stat().st_mode):
            raise UserError(f"{path}: cannot read the {what}: it is a device{mend}")
        content = path.read_bytes()
        if content.startswith(GZIP):
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: cannot unpack the {what}: {error}{mend}") from None
    except (OSError, ValueError) as error:
        missing = "no such file" if isinstance(error, FileNotFoundError) else error  # of a store, which shows the token
        reason = getattr(error, "strerror", None) or missing
        raise UserError(f"{path}: cannot read the {what}: {reason}{mend}") from error
    return content


def _document(path: Place, what: str, content: bytes) -> Any:
    try:
        return _parsed(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the {what} is not JSON ({shown(error)})") from None


class Entries(Sequence[Any]):
    """The entries of a list in a JSON file, each parsed whenever it is asked for: as values they take much more room.

    Asking for one raises UserError where it is not JSON after all.
    """

    def __init__(self, where: str, entries: list[msgspec.Raw]) -> None:
        self._where = where
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, position: int) -> Any: ...
    @overload
    def __getitem__(self, position: slice) -> list[Any]: ...
    def __getitem__(self, position: int | slice) -> Any:
        if isinstance(position, slice):
            return [self[each] for each in range(*position.indices(len(self)))]
        return self._value(self._entries[position])

    def __iter__(self) -> Iterator[Any]:
        return map(self._value, self._entries)

    def _value(self, entry: msgspec.Raw) -> Any:
        try:
            return _value(bytes(entry))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self._where}: not JSON ({shown(error)})") from None


def read_large_document(path: Place, what: str, mend: str = "") -> tuple[bytes, Any]:
    """As `read_document`, but a list at the top, or the lists of an object there, come as `Entries`.

    What msgspec does not take, such as `NaN` for a number, is parsed at once all the same.
    """
    content = _unpacked(path, what, mend)
    try:
        if content.lstrip()[:1] == b"[":
            return content, Entries(str(path), msgspec.json.decode(content, type=list[msgspec.Raw]))
        lists = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
        document = {
            name: Entries(str(path), msgspec.json.decode(value, type=list[msgspec.Raw]))
            if bytes(memoryview(value)[:1]) == b"["
            else _value(bytes(value))
            for name, value in lists.items()
        }
    except (msgspec.DecodeError, ValueError, RecursionError):
        return content, _document(path, what, content)
    return content, document


def _parsed(content: bytes) -> Any:
    """What `json.loads` gives, in a fifth of the time.

    The objects of a large file, all of which stay, would have Python's collector go through them again and again.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return _value(content)
    finally:
        if collects:
            gc.enable()


def _value(content: bytes) -> Any:
    try:
        return pydantic_core.from_json(content)
    except ValueError:  # it takes UTF-8 alone, and its messages are others
        return json.loads(content)


def check_document(
    where: str, document: Any, needs: Mapping[str, Mapping[str, Check]], may_lack: tuple[str, ...] = ()
) -> None:
    """Check that a document is COCO's: lists of objects with the keys that are relied on.

    Args:
        where: the file, for messages.
        document: the value.
        needs: the check of each key of the entries, by list.
        may_lack: lists that may be missing.

    Raises:
        UserError: naming the entry and the key.
    """
    lists = ", ".join(f"`{name}`" for name in needs)
    if not isinstance(document, dict):
        kind = "list" if isinstance(document, Entries) else type(document).__name__
        raise UserError(f"{where}: not COCO: the top is a {kind}, not an object: it needs the lists {lists}")
    for name, keys in needs.items():
        if name not in document and name in may_lack:
            continue
        if not isinstance(document.get(name), list | Entries):
            state = "missing" if name not in document else "null" if document[name] is None else "not a list"
            raise UserError(f"{where}: not COCO: the list `{name}` is {state}; it needs the lists {lists}")
        for position, entry in enumerate(document[name]):
            check_entry(where, f"{name}[{position}]", entry, keys)


def check_entry(where: str, entry_name: str, entry: Any, keys: Mapping[str, Check]) -> None:
    """Check one entry of a list; arguments and errors as of `check_document`."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: not COCO: {entry_name} is a {type(entry).__name__}, not an object")
    for key, check in keys.items():
        if key not in entry:
            raise UserError(f"{where}: not COCO: {entry_name} has no `{key}`")
        wanted = check(entry[key])
        if wanted is not None:
            raise UserError(
                f"{where}: not COCO: {entry_name} has `{key}` {shown(repr(entry[key]))}, it must be {wanted}"
            )


def _is_utf8(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
