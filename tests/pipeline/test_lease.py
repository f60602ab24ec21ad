"""One command at a time works on a folder in a store."""

import threading
import time

import pytest

from pipeline import lease
from pipeline.errors import UserError
from pipeline.lease import Lease, Watch
from pipeline.store import StorePath


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Holders count often, so that the tests wait shortly."""
    for name, seconds in (("RENEW", 0.1), ("LOST", 1.0), ("LOOK", 0.05), ("SETTLE", 0.2)):
        monkeypatch.setattr(lease, f"{name}_SECONDS", seconds)


@pytest.fixture
def path(s3_folder: StorePath) -> StorePath:
    return s3_folder / "run" / "lease.json"


def taken(path: StorePath, token: str | None = None) -> Lease:
    made = Lease(path, "the run x")
    made.take(token)
    return made


def test_a_new_folder_has_no_newest_copy(path: StorePath) -> None:
    assert not Lease(path, "the run x").take(None)
    assert path.exists()


def test_who_had_it_last_has_the_newest_copy(path: StorePath) -> None:
    first = taken(path)
    first.give_back()
    assert Lease(path, "the run x").take(first.token)
    other = taken(path, token="another machine's")
    other.give_back()
    assert not Lease(path, "the run x").take(first.token)


def test_one_that_counts_is_refused_to_others(path: StorePath) -> None:
    first = taken(path)
    ends = threading.Event()

    def count() -> None:
        while not ends.wait(0.05):
            first.renew()

    counting = threading.Thread(target=count)
    counting.start()
    try:
        with pytest.raises(UserError, match=r"the run x is running already on .* process \d+: wait for it"):
            Lease(path, "the run x").take(None)
    finally:
        ends.set()
        counting.join()
    first.check()


def test_one_that_counts_no_longer_is_followed(path: StorePath) -> None:
    first = taken(path)
    began = time.monotonic()
    second = taken(path)
    assert time.monotonic() - began >= 1
    assert second.token != first.token


def test_who_waits_gets_it_when_it_is_given_back(path: StorePath) -> None:
    first = taken(path)
    threading.Timer(0.3, first.give_back).start()
    second = Lease(path, "the run x")
    second.take(None, wait=True)
    second.check()


def test_who_lost_it_is_told(path: StorePath) -> None:
    first = taken(path)
    first.give_back()
    second = Lease(path, "the run x")
    second.take(None)
    # A token of its own tells them apart: here both are this process.
    with pytest.raises(UserError, match="which has taken it over: this command ends"):
        first.check()


def test_a_holder_is_seen_from_elsewhere(path: StorePath) -> None:
    watch = Watch(path)
    assert not watch.is_held()
    holder = taken(path)
    for _ in range(5):
        time.sleep(0.1)
        holder.renew()
        assert watch.is_held()
    time.sleep(1.1)
    assert not watch.is_held()
    holder.renew()
    assert watch.is_held()
    holder.give_back()
    assert not watch.is_held()


def test_a_file_that_is_being_written_over_is_read_again(path: StorePath) -> None:
    first = taken(path)
    content = path.read_bytes()
    path.write_bytes(content + b"}")
    threading.Timer(0.07, lambda: path.write_bytes(content)).start()
    first.check()


def test_a_file_that_is_none_is_told(path: StorePath) -> None:
    path.write_bytes(b"{]")
    with pytest.raises(UserError, match=r"lease\.json: says not who works on the run x"):
        Lease(path, "the run x").take(None)
