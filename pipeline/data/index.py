"""The index of a split: one row a sample, in a NumPy file that is mapped into memory and never parsed.

`index.npy` is one structured array, so that a sample lies on one page, a column is a view, and every process of a host
shares the pages. Its bytes depend on the samples alone: the digest of the data, which seeds the order and the
augmentation, must not change with the version of a library.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from pipeline.store import Place

INDEX_NAME = "index.npy"

ROW = np.dtype(
    [
        ("image_id", "<i8"),
        ("image_offset", "<i8"),
        ("json_offset", "<i8"),
        ("image_size", "<u4"),
        ("json_size", "<u4"),
        ("image_crc32", "<u4"),
        ("json_crc32", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("extension", "S8"),
    ]
)
"""Offsets and sizes are bytes of a member's content in the shard; the extension is that of the image's member.

Every field is aligned and none is followed by padding, whose bytes would be anything.
"""

Rows = NDArray[np.void]
"""[n] of `ROW`."""


class Member(NamedTuple):
    """Where the content of a tar's member is, and its CRC-32."""

    offset: int
    size: int
    crc32: int


class Sample(NamedTuple):
    """One image of a split: the number of its shard, and its two members there."""

    image_id: int
    width: int
    height: int
    shard: int
    extension: str
    image: Member
    json: Member

    @property
    def key(self) -> str:
        """Name of its members, without their extensions."""
        return f"{self.image_id:012d}"


class Index(Sequence[Sample]):
    """The samples of a split in the order of its shards, made of their rows when they are asked for.

    Args:
        rows: of all shards.
        shard_sizes: rows of each shard.
    """

    def __init__(self, rows: Rows, shard_sizes: Sequence[int]) -> None:
        self.rows = rows
        self._ends = np.cumsum(np.asarray(shard_sizes, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, number: int) -> Sample: ...
    @overload
    def __getitem__(self, number: slice) -> list[Sample]: ...
    def __getitem__(self, number: int | slice) -> Sample | list[Sample]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        image_id, *numbers, extension = self.rows[number].item()
        image_offset, json_offset, image_size, json_size, image_crc32, json_crc32, width, height = numbers
        return Sample(
            image_id=image_id,
            width=width,
            height=height,
            shard=int(np.searchsorted(self._ends, number, side="right")),
            extension=extension.decode("ascii", "replace"),
            image=Member(image_offset, image_size, image_crc32),
            json=Member(json_offset, json_size, json_crc32),
        )

    def sizes(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """(width, height) of some samples: [n, 2]."""
        rows = self.rows[numbers]
        return np.stack([rows["width"], rows["height"]], axis=1).astype(np.int64)


def to_rows(samples: Sequence[Sample]) -> Rows:
    """The rows of samples; their shard is not in them."""
    return np.array(
        [
            (s.image_id, s.image.offset, s.json.offset, s.image.size, s.json.size, s.image.crc32, s.json.crc32,
             s.width, s.height, s.extension.encode())
            for s in samples
        ],
        dtype=ROW,
    )  # fmt: skip


def open_rows(path: Path, count: int) -> Rows:
    """The rows of an index file, mapped into memory.

    Raises:
        ValueError: it is no index of so many samples.
        OSError: it cannot be read.
    """
    try:
        rows: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except (SyntaxError, TokenError) as error:  # NumPy reads a header as Python
        raise ValueError("its header is damaged") from error
    if rows.dtype != ROW or rows.shape != (count,):
        raise ValueError(f"it holds {rows.shape} of {rows.dtype}, not the rows of {count} samples")
    return rows.view(np.ndarray)  # type: ignore[no-any-return]


def write_rows(path: Path, parts: Sequence[Place], count: int) -> None:
    """Write an index file from those of its shards, which hold `count` rows together."""
    header = {"descr": np.lib.format.dtype_to_descr(ROW), "fortran_order": False, "shape": (count,)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.load(io.BytesIO(part.read_bytes()), allow_pickle=False).tobytes())
