"""Writing files whole, one writer at a time, and what is said when it cannot be done."""

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.files import disk_error, held, is_held, locked, make_folder, read_json, sha256_of, write_json, write_whole
from tests.builders import disk_of

HOLD = """
import sys
from pathlib import Path
from pipeline.files import held, locked
with {lock}:
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(lock: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a lock until its input ends."""
    command = [sys.executable, "-c", HOLD.format(lock=lock), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


class TestWriteWhole:
    def test_replaces_and_leaves_nothing_beside(self, tmp_path: Path) -> None:
        for content in (b"first", b"second"):
            write_whole(tmp_path / "file", content)
            assert (tmp_path / "file").read_bytes() == content
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_a_full_disk_leaves_what_was_there(self, tmp_path: Path) -> None:
        write_whole(tmp_path / "file", b"before")
        with disk_of(100), pytest.raises(OSError, match="File too large"):
            write_whole(tmp_path / "file", bytes(1000))
        assert (tmp_path / "file").read_bytes() == b"before"
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_is_on_the_disk_before_it_has_its_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        synced: list[bool] = []
        monkeypatch.setattr("os.fsync", lambda descriptor: synced.append((tmp_path / "file").exists()))
        write_whole(tmp_path / "file", b"content")
        assert synced == [False, True], "first the content, then the name"


class TestJson:
    def test_survives_the_disk(self, tmp_path: Path) -> None:
        content = {"a": [1, None, 0.1], "b": {"ä": True}}
        write_json(tmp_path / "new" / "folder" / "a.json", content)
        assert read_json(tmp_path / "new" / "folder" / "a.json", "settings") == content

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            pytest.param(None, "cannot read the settings: No such file", id="missing"),
            pytest.param(b"{", "the settings is not JSON", id="half"),
            pytest.param(b"\xff\xd8\xff", "the settings is not JSON", id="an image"),
        ],
    )
    def test_what_cannot_be_read_is_named(self, content: bytes | None, message: str, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=f"{re.escape(str(path))}: {message}"):
            read_json(path, "settings")


class TestMakeFolder:
    def test_with_those_above_it_and_again(self, tmp_path: Path) -> None:
        for _ in range(2):
            make_folder(tmp_path / "a" / "b")
        assert (tmp_path / "a" / "b").is_dir()

    @pytest.mark.parametrize("below", ["file", "file/folder"])
    def test_a_file_in_its_place(self, below: str, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=rf"{below}: cannot be made a folder .*choose another name"):
            make_folder(tmp_path / below)

    def test_a_folder_that_takes_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
        with pytest.raises(UserError, match="nothing can be written in this folder"):
            make_folder(tmp_path)


class TestLocked:
    def test_another_process_waits(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        entered = threading.Event()

        def enter() -> None:
            with locked(tmp_path / "lock"):
                entered.set()

        with another_process("locked(Path(sys.argv[1]))", tmp_path / "lock") as other:
            waiting = threading.Thread(target=enter)
            with caplog.at_level("INFO", logger="raydetr"):
                waiting.start()
                assert not entered.wait(0.2)
            other.kill()
            assert entered.wait(10), "a lock ends with its process"
            waiting.join()
        assert f"waiting for another process that writes here ({tmp_path / 'lock'})" in caplog.text

    def test_a_free_one_is_taken_at_once(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level("INFO", logger="raydetr"):
            for _ in range(2):
                with locked(tmp_path / "lock"):
                    pass
        assert not caplog.text


class TestHeld:
    def test_says_who_holds_it_and_leaves_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "run" / "lock"
        with held(path, "the run demo"):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        assert not list(tmp_path.iterdir())

    def test_what_else_is_in_the_folder_stays(self, tmp_path: Path) -> None:
        def fail() -> None:
            with held(tmp_path / "run" / "lock", "the run demo"):
                (tmp_path / "run" / "result").touch()
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["result"]

    def test_a_second_process_is_refused_with_the_name_of_the_first(self, tmp_path: Path) -> None:
        path = tmp_path / "run" / "lock"
        with another_process('held(Path(sys.argv[1]), "the run demo")', path) as other:
            told = rf"the run demo is running already on .+ since .+, process {other.pid}: wait for it, stop it, or use"
            with pytest.raises(UserError, match=told), held(path, "the run demo"):
                pass
            other.send_signal(signal.SIGKILL)
            other.wait()
            with held(path, "the run demo"):
                assert json.loads(path.read_text())["pid"] == os.getpid()

    def test_or_waits(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = tmp_path / "run" / "lock"
        with another_process('held(Path(sys.argv[1]), "the run demo")', path) as other:
            assert other.stdin is not None
            ending = threading.Timer(0.3, other.stdin.close)
            with caplog.at_level("INFO", logger="raydetr"):
                ending.start()
                with held(path, "the run demo", wait=True):
                    assert json.loads(path.read_text())["pid"] == os.getpid()
            assert other.wait() == 0
        assert f"waiting for the run demo, which is running on {os.uname().nodename} since" in caplog.text
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "message"),
    [
        pytest.param(errno.ENOSPC, r"^out: no space left .*write elsewhere with shards\.out$", id="full disk"),
        pytest.param(errno.EDQUOT, r"^out: no space left .*write elsewhere with shards\.out$", id="quota"),
        pytest.param(errno.EACCES, r"^out/a\.tar: cannot be written .*set shards\.out$", id="no permission"),
        pytest.param(errno.EROFS, r"^out/a\.tar: cannot be written .*set shards\.out$", id="read-only disk"),
        pytest.param(errno.EEXIST, r"^out/a\.tar: cannot be written .*set shards\.out$", id="a file for a folder"),
        pytest.param(errno.ENOTDIR, r"^out/a\.tar: cannot be written .*set shards\.out$", id="below a file"),
    ],
)
def test_an_error_of_the_disk_is_the_users(number: int, message: str) -> None:
    told = disk_error(Path("out"), OSError(number, os.strerror(number), "out/a.tar"), "shards.out")
    assert isinstance(told, UserError)
    assert re.search(message, str(told))


def test_another_error_stays_as_it_is() -> None:
    error = OSError(errno.EIO, "Input/output error")
    assert disk_error(Path("out"), error, "shards.out") is error
    nameless = PermissionError(errno.EACCES, "Permission denied")
    assert str(disk_error(Path("out"), nameless, "runs")).startswith("out: cannot be written")


def test_the_sha256_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_whether_a_lock_is_held(tmp_path: Path) -> None:
    lock = tmp_path / "run" / "lock"
    assert not is_held(lock)
    assert not lock.parent.exists()
    with held(lock, "the run"):
        assert is_held(lock)
    lock.parent.mkdir()
    lock.write_text("left by a process that was killed")
    assert not is_held(lock)
    assert lock.read_text() == "left by a process that was killed"
