"""The index of a split: its rows are the samples, whatever their number."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.data.index import ROW, Index, Member, Sample, open_rows, to_rows, write_rows


def sample(number: int, shard: int = 0) -> Sample:
    return Sample(
        image_id=10**12 + number,
        width=640,
        height=480 + number,
        shard=shard,
        extension="webp",
        image=Member(2**40 + number, 2**30, 2**32 - 1),
        json=Member(2**41, number, 0),
    )


def written(folder: Path, *sizes: int) -> Index:
    """An index of shards of some sizes, from the disk."""
    parts = []
    for shard, size in enumerate(sizes):
        parts.append(folder / f"{shard}.npy")
        np.save(parts[-1], to_rows([sample(number, shard) for number in range(size)]))
    write_rows(folder / "index.npy", parts, sum(sizes))
    return Index(open_rows(folder / "index.npy", sum(sizes)), sizes)


def test_samples_survive_the_disk_in_the_order_of_their_shards(tmp_path: Path) -> None:
    index = written(tmp_path, 3, 1, 2)
    assert len(index) == 6
    assert list(index) == [sample(n, shard) for n, shard in ((0, 0), (1, 0), (2, 0), (0, 1), (0, 2), (1, 2))]
    assert index[-1] == index[5]
    assert index[1:4:2] == [index[1], index[3]]
    assert index[0].key == "1000000000000"
    with pytest.raises(IndexError):
        index[6]
    np.testing.assert_array_equal(index.sizes(np.array([5, 2])), [[640, 481], [640, 482]])


def test_rows_are_mapped_and_hold_no_byte_of_chance(tmp_path: Path) -> None:
    rows = written(tmp_path, 4).rows
    base = rows.base
    assert isinstance(base, np.memmap)
    assert ROW.itemsize == sum(ROW[name].itemsize for name in ROW.names or ())
    assert all((offset % min(8, dtype.itemsize)) == 0 for dtype, offset in (ROW.fields or {}).values())


@pytest.mark.parametrize("count", [0, 3, 5])
def test_another_number_of_samples_is_told(tmp_path: Path, count: int) -> None:
    written(tmp_path, 4)
    with pytest.raises(ValueError, match=rf"not the rows of {count} samples"):
        open_rows(tmp_path / "index.npy", count)


def test_another_array_is_told(tmp_path: Path) -> None:
    np.save(tmp_path / "index.npy", np.zeros(4))
    with pytest.raises(ValueError, match="of float64, not the rows"):
        open_rows(tmp_path / "index.npy", 4)
    np.save(tmp_path / "index.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError):  # noqa: PT011 nothing is unpickled
        open_rows(tmp_path / "index.npy", 1)


@pytest.mark.parametrize(("position", "value"), [(10, ord("z")), (35, ord(","))], ids=["token", "syntax"])
def test_a_damaged_header_is_told(tmp_path: Path, position: int, value: int) -> None:
    written(tmp_path, 4)
    content = bytearray((tmp_path / "index.npy").read_bytes())
    content[position] = value
    (tmp_path / "index.npy").write_bytes(content)
    with pytest.raises(ValueError, match="its header is damaged"):
        open_rows(tmp_path / "index.npy", 4)
