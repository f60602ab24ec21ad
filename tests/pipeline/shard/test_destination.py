"""pipeline/shard/destination.py: the same on a disk and in a store."""

import tempfile
import threading
from pathlib import Path

import pytest

from pipeline.files import sha256_of
from pipeline.shard.destination import (
    alone,
    begin,
    clear,
    is_still,
    move,
    names_in,
    publish,
    remove,
    scratch,
    unfinished_of,
)
from pipeline.store import Place, StorePath

SCRATCH = "scratch"


@pytest.fixture(params=["disk", "store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Where shards go; temporary files of a store lie in `SCRATCH`."""
    (tmp_path / SCRATCH).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / SCRATCH))
    out = tmp_path / "out" if request.param == "disk" else request.getfixturevalue("s3_folder")
    out = out / "train"
    begin(out) if isinstance(out, StorePath) else out.mkdir(parents=True)
    return out


def write(path: Place, content: bytes) -> None:
    with scratch(path) as temporary:
        temporary.write_bytes(content)
        move(temporary, path)


def left_behind(folder: Place, tmp_path: Path) -> list[str]:
    return [path.name for path in (folder if isinstance(folder, Path) else tmp_path / SCRATCH).iterdir()]


class TestScratch:
    def test_is_moved(self, folder: Place, tmp_path: Path) -> None:
        write(folder / "a.tar", b"one")
        assert (folder / "a.tar").read_bytes() == b"one"
        assert names_in(folder) == ["a.tar"]
        assert left_behind(folder, tmp_path) == (["a.tar"] if isinstance(folder, Path) else [])

    def test_nothing_is_left_of_what_is_not_moved(self, folder: Place, tmp_path: Path) -> None:
        with scratch(folder / "a.tar") as temporary:
            temporary.write_bytes(b"half")
        assert names_in(folder) == left_behind(folder, tmp_path) == []

    def test_two_write_one_file(self, folder: Place) -> None:
        with scratch(folder / "a.tar") as first, scratch(folder / "a.tar") as second:
            for temporary in (first, second):
                temporary.write_bytes(b"same")
                move(temporary, folder / "a.tar")
        assert (folder / "a.tar").read_bytes() == b"same"


def test_is_still_the_same(folder: Place) -> None:
    write(folder / "a.tar", b"12345")
    sha256 = sha256_of(folder / "a.tar")
    assert is_still(folder / "a.tar", 5, sha256)
    write(folder / "a.tar", b"123")
    assert not is_still(folder / "a.tar", 5, sha256)
    write(folder / "a.tar", b"54321")
    assert is_still(folder / "a.tar", 5, sha256) == isinstance(folder, StorePath)


def test_names_are_removed(folder: Place) -> None:
    for name in ("a", "b", "c"):
        write(folder / name, b"x")
    remove(folder, ["a", "b", "never was"])
    assert names_in(folder) == ["c"]
    clear(folder)
    assert names_in(folder) == []
    write_after = folder / "d"
    begin(folder)
    write(write_after, b"x")
    begin(folder)
    assert names_in(folder) == []


def test_a_folder_is_published_whole(folder: Place) -> None:
    final = folder / "val"
    unfinished = unfinished_of(final)
    begin(unfinished)
    write(unfinished / "a", b"x")
    assert (final / "a").exists() == isinstance(folder, StorePath)
    publish(unfinished, final)
    assert names_in(final) == ["a"]
    assert names_in(folder) == (["val"] if isinstance(folder, Path) else ["val/a"])


def test_one_writes_a_split_on_a_disk(tmp_path: Path) -> None:
    entered = threading.Event()

    def enter(split: str) -> None:
        with alone(tmp_path / "out", split):
            entered.set()

    with alone(tmp_path / "out", "train"):
        second = threading.Thread(target=enter, args=("train",))
        second.start()
        assert not entered.wait(0.2)
        other = threading.Thread(target=enter, args=("val",))
        other.start()
        other.join()
        assert entered.is_set()
    second.join()
