"""Copies of a store's files, against a real S3 server."""

import hashlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.config.sections import ShardsSection
from pipeline.data.cache import Cache, FetchAhead, cache_of
from pipeline.errors import UserError
from pipeline.store import StorePath
from tests.builders import disk_of

SIZE = 50_000


def put(folder: StorePath, name: str) -> tuple[StorePath, str, int]:
    content = os.urandom(SIZE)
    (folder / name).write_bytes(content)
    return folder / name, hashlib.sha256(content).hexdigest(), SIZE


class TestFetch:
    def test_once(self, s3_folder: StorePath, tmp_path: Path) -> None:
        file = put(s3_folder, "a")
        cache = Cache(tmp_path / "cache", 10 * SIZE)
        copy = cache.fetch(*file)
        file[0].unlink()
        assert cache.fetch(*file) == copy
        assert hashlib.sha256(copy.read_bytes()).hexdigest() == file[1]
        assert os.listdir(tmp_path / "cache") == [file[1]]

    def test_by_many_at_once(self, s3_folder: StorePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        files = [put(s3_folder, f"{number}") for number in range(4)]
        cache = Cache(tmp_path / "cache", 10 * SIZE)
        fetched: list[str] = []
        download = StorePath.download

        def counted(self: StorePath, path: Path) -> None:
            fetched.append(self.name)
            download(self, path)

        monkeypatch.setattr(StorePath, "download", counted)
        with ThreadPoolExecutor(16) as pool:
            copies = list(pool.map(lambda number: cache.fetch(*files[number % 4]), range(64)))
        assert sorted(fetched) == ["0", "1", "2", "3"]
        assert {copy.name for copy in copies} == {sha256 for _, sha256, _ in files}
        assert sorted(os.listdir(tmp_path / "cache")) == sorted(sha256 for _, sha256, _ in files)

    def test_another_process_that_is_killed_leaves_nothing_wrong(self, s3_folder: StorePath, tmp_path: Path) -> None:
        file = put(s3_folder, "a")
        script = (
            "import os, signal, sys; from pathlib import Path; from pipeline.data.cache import Cache;"
            "from pipeline.store import StorePath;"
            "StorePath.download = lambda self, path: (path.write_bytes(b'half'), os.kill(os.getpid(), signal.SIGKILL));"
            "Cache(Path(sys.argv[1])).fetch(StorePath(sys.argv[2]), sys.argv[3], int(sys.argv[4]))"
        )
        words = [sys.executable, "-c", script, str(tmp_path / "cache"), str(file[0]), file[1], str(file[2])]
        assert subprocess.run(words, check=False).returncode == -9
        assert os.listdir(tmp_path / "cache") == [f"{file[1]}.part"]
        copy = Cache(tmp_path / "cache").fetch(*file)
        assert hashlib.sha256(copy.read_bytes()).hexdigest() == file[1]
        assert os.listdir(tmp_path / "cache") == [file[1]]

    def test_without_waiting_another_one_s_work_is_left_to_it(self, s3_folder: StorePath, tmp_path: Path) -> None:
        import fcntl

        file = put(s3_folder, "a")
        cache = Cache(tmp_path)
        with (tmp_path / f"{file[1]}.part").open("wb") as part:
            fcntl.flock(part, fcntl.LOCK_EX)
            assert not cache.fetch(*file, wait=False).exists()
        assert cache.fetch(*file, wait=False).exists()


class TestLimit:
    def test_the_least_recently_used_go(self, s3_folder: StorePath, tmp_path: Path) -> None:
        files = [put(s3_folder, f"{number}") for number in range(4)]
        cache = Cache(tmp_path, 3 * SIZE)
        for age, file in enumerate(files[:3]):
            os.utime(cache.fetch(*file), (age, age))
        cache.fetch(*files[0])
        cache.fetch(*files[3])
        assert {path.name for path in tmp_path.iterdir()} == {files[number][1] for number in (0, 2, 3)}

    def test_what_is_open_stays_readable(self, s3_folder: StorePath, tmp_path: Path) -> None:
        first, second = put(s3_folder, "a"), put(s3_folder, "b")
        cache = Cache(tmp_path, SIZE)
        descriptor = cache.open(*first)
        cache.fetch(*second)
        assert os.listdir(tmp_path) == [second[1]]
        assert hashlib.sha256(os.pread(descriptor, SIZE, 0)).hexdigest() == first[1]
        os.close(descriptor)

    def test_a_full_disk_frees_what_there_is(
        self, s3_folder: StorePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = put(s3_folder, "a"), put(s3_folder, "b")
        cache = Cache(tmp_path)
        cache.fetch(*first)
        download = StorePath.download

        def full(self: StorePath, path: Path) -> None:
            with disk_of(1000 if (tmp_path / first[1]).exists() else 2 * SIZE):
                download(self, path)

        monkeypatch.setattr(StorePath, "download", full)
        cache.fetch(*second)
        assert os.listdir(tmp_path) == [second[1]]

    def test_no_space_at_all_is_told(self, s3_folder: StorePath, tmp_path: Path) -> None:
        file = put(s3_folder, "a")
        with disk_of(1000), pytest.raises(UserError, match=r"no space left .*write elsewhere with shards\.cache"):
            Cache(tmp_path).fetch(*file)
        assert [path.stat().st_size for path in tmp_path.iterdir()] == [0]


class TestDamage:
    def test_other_bytes_in_the_store_are_told(self, s3_folder: StorePath, tmp_path: Path) -> None:
        file, sha256, size = put(s3_folder, "a")
        file.write_bytes(os.urandom(size))
        with pytest.raises(UserError, match=r"its sha256 is not the manifest's: .*; shard again"):
            Cache(tmp_path).fetch(file, sha256, size)
        assert os.listdir(tmp_path) == []

    def test_a_missing_file_is_told(self, s3_folder: StorePath, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="it is not in its store"):
            Cache(tmp_path).fetch(s3_folder / "a", "0" * 64, 1)
        assert os.listdir(tmp_path) == []

    def test_another_user_s_folder_is_not_trusted(
        self, s3_folder: StorePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(UserError, match=r"another user's.*set shards\.cache"):
            Cache(tmp_path).fetch(s3_folder / "a", "0" * 64, 1)


class TestFetchAhead:
    def test_the_first_first_and_nothing_after_closing(self) -> None:
        done: list[int] = []
        first, go_on, last = threading.Event(), threading.Event(), threading.Event()

        def fetch(number: int) -> None:
            done.append(number)
            first.set()
            go_on.wait(10)
            if number == 7:
                last.set()
            if number == 6:
                raise UserError("is told where it is needed")

        ahead = FetchAhead(fetch)
        ahead.want([1, 2, 3])
        assert first.wait(10)
        ahead.want([6, 7])
        go_on.set()
        assert last.wait(10)
        ahead.close()
        ahead.want([8])
        assert done == [1, 6, 7]


def test_the_configured_one(tmp_path: Path) -> None:
    assert cache_of(ShardsSection()) == Cache(None, 100 * 2**30)
    assert cache_of(ShardsSection(cache=str(tmp_path), cache_bytes=7)) == Cache(tmp_path, 7)
