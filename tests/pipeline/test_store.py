"""Paths in a store, against a real S3 server, a real web server, and a network that fails."""

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import store
from pipeline.errors import StoreError, UserError
from pipeline.store import StorePath, absolute, place, size_of
from tests.stores import FaultyNetwork, S3Server, web_server


@pytest.fixture(params=["s3", "http"])
def served(
    request: pytest.FixtureRequest, s3: S3Server, s3_folder: StorePath, tmp_path: Path
) -> Iterator[tuple[StorePath, dict[str, bytes]]]:
    """A folder of a store, and the files in it."""
    files = {"a.json.gz": b"{}", "below/b #?.bin": os.urandom(100_000), "empty": b""}
    if request.param == "s3":
        for name, content in files.items():
            (s3_folder / name).write_bytes(content)
        yield s3_folder, files
        return
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with web_server(tmp_path) as address:
        yield StorePath(address), files


class _Failing(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send_error(503)

    def do_HEAD(self) -> None:
        self.send_error(503)


def test_parent() -> None:
    assert str((StorePath("s3://bucket/folder") / "deep/a.jpg").parent) == "s3://bucket/folder/deep"
    assert StorePath("s3://bucket/deep/a.json?scheme=http").parent == StorePath("s3://bucket/deep?scheme=http")


class TestReading:
    def test_whole_files(self, served: tuple[StorePath, dict[str, bytes]], tmp_path: Path) -> None:
        folder, files = served
        for name, content in files.items():
            assert (folder / name).read_bytes() == content
            assert (folder / name).size() == size_of(folder / name) == len(content)
            (folder / name).download(tmp_path / "copy")
            assert (tmp_path / "copy").read_bytes() == content
        sizes: dict[str, int | None] = {name: len(content) for name, content in files.items()}
        assert folder.sizes([*files, "missing"]) == {**sizes, "missing": None}

    def test_what_is_not_there(self, served: tuple[StorePath, dict[str, bytes]]) -> None:
        missing = served[0] / "missing"
        assert not missing.exists()
        assert missing.size() is None
        with pytest.raises(FileNotFoundError):
            missing.read_bytes()

    def test_here_and_there(self, s3_folder: StorePath) -> None:
        content = os.urandom(300_000)
        (s3_folder / "file").write_bytes(content)
        with (s3_folder / "file").open() as file:
            file.seek(-5, os.SEEK_END)
            assert file.read() == content[-5:]
            file.seek(7)
            assert file.read(200_000) == content[7:200_007]
            assert file.tell() == 200_007


class TestWriting:
    def test_an_upload_is_the_file(self, s3_folder: StorePath, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(os.urandom(6_000_000))  # more than one part
        (s3_folder / "below" / "file").upload(tmp_path / "file")
        assert (s3_folder / "below" / "file").read_bytes() == (tmp_path / "file").read_bytes()
        assert s3_folder.list() == {"below/file": 6_000_000}

    def test_removing(self, s3_folder: StorePath) -> None:
        (s3_folder / "file").write_bytes(b"x")
        (s3_folder / "file").unlink()
        (s3_folder / "file").unlink()
        assert s3_folder.list() == {}


class TestFailure:
    def test_a_failing_network_is_told_to_nobody(
        self, s3: S3Server, s3_folder: StorePath, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        network = FaultyNetwork(s3.port, rate=0.5, seed=3, kinds=("500", "503", "cut"))
        monkeypatch.setattr(store, "PAUSES", (0.01,) * 12)
        shaky = StorePath(f"{s3_folder.root}?scheme=http&endpoint_override=127.0.0.1:{network.port}")
        contents = {f"{number}": os.urandom(40_000) for number in range(4)}
        for name, content in contents.items():
            (shaky / name).write_bytes(content)
        for name, content in contents.items():
            assert (shaky / name).read_bytes() == content
        assert shaky.list() == {name: len(content) for name, content in contents.items()}
        network.close()
        assert all(network.failed.values())

    def test_a_store_that_is_away_is_told_once(self, s3_folder: StorePath, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(store, "PAUSES", ())
        away = StorePath(f"{s3_folder.root}?scheme=http&endpoint_override=127.0.0.1:1")
        with pytest.raises(StoreError, match=r"^s3://.*/file: cannot be read in its store .*; check") as told:
            (away / "file").read_bytes()
        assert "\n" not in str(told.value)

    @pytest.mark.parametrize("status", [None, 503])
    def test_a_web_server_that_fails_is_not_taken_for_a_missing_file(
        self, status: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(store, "PAUSES", ())
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Failing) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            port = server.server_address[1] if status else 1
            with pytest.raises(StoreError, match=str(status) if status else "Cannot connect"):
                StorePath(f"http://127.0.0.1:{port}/file").exists()
            server.shutdown()

    def test_a_wrong_bucket_is_not_tried_again(self, s3_folder: StorePath, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(store, "PAUSES", (1000.0,))
        with pytest.raises(UserError, match="NO_SUCH_BUCKET"):
            StorePath("s3://no-such-bucket/x").write_bytes(b"x")

    def test_an_option_that_there_is_not(self) -> None:
        with pytest.raises(UserError, match=r"^s3://bucket/x: not an address of a store .*colour"):
            StorePath("s3://bucket/x?colour=red").exists()


class TestPlace:
    def test_paths_and_addresses(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert place("data") == Path("data")
        assert absolute("data") == tmp_path / "data"
        assert place("file:///data/a%20b") == Path("/data/a b")
        assert (
            place("s3://bucket/a?region=x") == absolute("s3://bucket/a?region=x") == StorePath("s3://bucket/a?region=x")
        )
        shown = place("s3://bucket/a/?region=x") / "b" / "c.tar"
        assert (str(shown), shown.name, shown.suffix) == ("s3://bucket/a/b/c.tar", "c.tar", ".tar")
        assert str(shown.with_suffix(".npy")) == "s3://bucket/a/b/c.npy"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("ftp://host/x", "begins with one of s3"),
            ("s3://", "must name a bucket"),
            ("https://user:secret@host/x", "must have no password"),
        ],
    )
    def test_others_are_refused(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message) as told:
            place(text)
        assert "secret" not in str(told.value)
