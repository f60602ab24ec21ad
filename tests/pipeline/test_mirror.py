"""The copies of a run in a store: what one side writes, the other finds."""

import errno
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from pipeline import lease, mirror
from pipeline.errors import FullDiskError, StoreError, UserError
from pipeline.mirror import Mirror, checkpoint_here, checkpoints_in_store, driver_mirror, worker_mirror
from pipeline.run_folder import RunFolder
from pipeline.store import StorePath

WAIT_SECONDS = 30


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(lease, "LOST_SECONDS", 0.3)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(mirror, "SYNC_SECONDS", 0.05)


@pytest.fixture
def run(s3_folder: StorePath, tmp_path: Path) -> RunFolder:
    """A driver's copy of a run in a store."""
    return RunFolder(tmp_path / "driver", s3_folder / "run")


def copy_of(run: RunFolder, path: Path) -> RunFolder:
    return RunFolder(path, run.store)


def write_checkpoint(run: RunFolder, step: int, content: str = "weights") -> Path:
    folder = run.checkpoints / f"checkpoint-{step}"
    temporary = folder.with_name(f"{folder.name}.tmp")
    temporary.mkdir(parents=True)
    (temporary / "model.safetensors").write_text(f"{content} {step}")
    (temporary / "state.json").write_text(f"{content} {step}")
    return temporary.rename(folder)


def wait_for(seen: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.02)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_a_run_on_a_disk_is_its_own_copy(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with driver_mirror(run, "the run"), worker_mirror(run, 1) as worker, checkpoint_here(run, tmp_path) as here:
        assert worker.run is run
        assert here == tmp_path
        worker.sync()
        worker.send_patiently()


def test_each_side_finds_what_the_other_writes(run: RunFolder) -> None:
    with driver_mirror(run, "the run"), worker_mirror(run, 0) as worker:
        copy = worker.run
        copy.train_spool.parent.mkdir(parents=True)
        copy.train_spool.write_text("one\n")
        write_checkpoint(copy, 10)
        worker.send_patiently()
        wait_for(lambda: names(run.checkpoints) == {"checkpoint-10"})
        assert run.train_spool.read_text() == "one\n"
        with copy.train_spool.open("a") as spool:
            spool.write("two\n")
        wait_for(lambda: run.train_spool.read_text() == "one\ntwo\n")
        run.stop.touch()
        wait_for(copy.stop.exists)
        run.stop.unlink()
        wait_for(lambda: not copy.stop.exists())
        run.parent.mkdir()
        (run.parent / "model.safetensors").write_text("to begin with")
        wait_for((copy.parent / "model.safetensors").exists)
        (run.evaluation / "checkpoint-10").mkdir(parents=True)
        (run.evaluation / "checkpoint-10" / "metrics.json").write_text("{}")
        wait_for(lambda: copy.scores().keys() == {"checkpoint-10"})
        (run.results(5) / "checkpoint-10").mkdir(parents=True)
        (run.results(5) / "checkpoint-10" / "metrics.json").write_text("{}")
        wait_for(lambda: copy.scores(5).keys() == {"checkpoint-10"})


def test_a_checkpoint_that_goes_is_gone_everywhere(run: RunFolder) -> None:
    assert run.store is not None
    with driver_mirror(run, "the run") as driver:
        with worker_mirror(run, 0) as worker:
            for step in (1, 2):
                write_checkpoint(worker.run, step)
        driver.sync()
        assert names(run.checkpoints) == {"checkpoint-1", "checkpoint-2"}
        with worker_mirror(run, 0) as worker:  # which has nothing but their states
            path = worker.run.checkpoints / "checkpoint-1"
            assert names(path) == {"state.json"}
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        driver.sync()
        assert names(run.checkpoints) == {"checkpoint-2"}
        assert (run.store / "checkpoints").list().keys() == {
            "checkpoint-2/model.safetensors",
            "checkpoint-2/state.json",
        }


def test_a_worker_keeps_one_checkpoint_whole(run: RunFolder) -> None:
    assert run.store is not None
    with worker_mirror(run, 0) as worker:
        for step in (1, 2, 3):
            write_checkpoint(worker.run, step)
            worker.send_patiently()
        copies = {path.name: names(path) for path in worker.run.checkpoints.iterdir()}
    assert copies.pop("checkpoint-3") == {"model.safetensors", "state.json"}
    assert copies == {"checkpoint-1": {"state.json"}, "checkpoint-2": {"state.json"}}
    assert len((run.store / "checkpoints").list()) == 6


def test_another_machine_begins_with_all_there_is(run: RunFolder, tmp_path: Path) -> None:
    with driver_mirror(run, "the run"):
        run.mlflow_run.write_text("the run's")
        with worker_mirror(run, 0) as worker:
            write_checkpoint(worker.run, 5)
    other = copy_of(run, tmp_path / "other")
    other.path.mkdir()
    other.mlflow_run.write_text("of a run long ago")
    write_checkpoint(other, 3)
    with driver_mirror(other, "the run"):
        assert other.mlflow_run.read_text() == "the run's"
        assert names(other.checkpoints) == {"checkpoint-5"}


def test_the_machine_of_a_killed_command_has_what_the_store_has_not(run: RunFolder) -> None:
    with ExitStack() as killed, pytest.MonkeyPatch.context() as patched:
        patched.setattr(Mirror, "close", lambda self: self._closed.set())
        patched.setattr(lease.Lease, "give_back", lambda self: None)
        killed.enter_context(driver_mirror(run, "the run"))
        killed.close()
    run.mlflow_run.write_text("not yet sent")
    with driver_mirror(run, "the run"):
        assert run.store is not None
        assert (run.store / "mlflow_run.json").read_bytes() == b"not yet sent"


def test_checkpoints_are_found_without_a_copy(run: RunFolder) -> None:
    assert checkpoints_in_store(run) == []
    with worker_mirror(run, 0) as worker:
        for step in (5, 10):
            write_checkpoint(worker.run, step)
        write_checkpoint(worker.run, 20).rename(worker.run.checkpoints / "checkpoint-20.damaged")
    there = checkpoints_in_store(run)
    assert there == [run.checkpoints / "checkpoint-5", run.checkpoints / "checkpoint-10"]
    assert not run.path.exists()
    with checkpoint_here(run, there[-1]) as here:
        assert (here / "model.safetensors").read_text() == "weights 10"


def test_a_folder_of_copies_of_another_user_is_refused(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    monkeypatch.setattr(mirror, "copies_folder", lambda: run.path.parent)
    with pytest.raises(UserError, match=r"another user's.*set TMPDIR"), driver_mirror(run, "the run"):
        pass


def test_a_checkpoint_of_the_same_name_is_got_anew(run: RunFolder, tmp_path: Path) -> None:
    with driver_mirror(run, "the run") as driver:
        with worker_mirror(run, 0) as worker:
            write_checkpoint(worker.run, 5)
        driver.sync()
        with worker_mirror(run, 0) as worker:
            path = worker.get_checkpoint("checkpoint-5")
            path.rename(path.with_name("checkpoint-5.damaged"))
            write_checkpoint(worker.run, 5, "other weights")
        driver.sync()
        assert (run.checkpoints / "checkpoint-5" / "model.safetensors").read_text() == "other weights 5"
    with checkpoint_here(run, run.checkpoints / "checkpoint-5") as here:
        assert (here / "model.safetensors").read_text() == "other weights 5"
        assert here.parent != run.checkpoints
    missing = run.checkpoints / "checkpoint-6"
    with pytest.raises(UserError, match="checkpoint-6: is no whole checkpoint"), checkpoint_here(run, missing):
        pass


def test_only_rank_0_writes_what_all_share(run: RunFolder) -> None:
    assert run.store is not None
    with worker_mirror(run, 1) as worker:
        write_checkpoint(worker.run, 5)
        worker.run.watch.mkdir()
        for rank in (0, 1):
            (worker.run.watch / f"rank-{rank}.log").write_text("seen\n")
    assert run.store.list().keys() == {"watch/rank-1.log"}
    with worker_mirror(run, 1) as worker, (worker.run.watch / "rank-1.log").open("a") as log:
        log.write("again\n")
    assert (run.store / "watch" / "rank-1.log").read_bytes() == b"seen\nagain\n"


def test_a_store_that_fails_is_waited_for(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "PATIENCE_PAUSE", 0.01)
    real, failing = StorePath.upload, 3

    def upload(self: StorePath, path: Path) -> None:
        nonlocal failing
        failing -= 1
        if failing >= 0:
            raise StoreError(f"{self}: is away")
        real(self, path)

    with worker_mirror(run, 0) as worker:
        monkeypatch.setattr(mirror, "SYNC_SECONDS", 1000.0)
        monkeypatch.setattr(StorePath, "upload", upload)
        write_checkpoint(worker.run, 5)
        worker.send_patiently()
        assert run.store is not None
        assert (run.store / "checkpoints" / "checkpoint-5" / "state.json").exists()
        monkeypatch.setattr(mirror, "PATIENCE_SECONDS", 0.05)
        failing = 10**6
        write_checkpoint(worker.run, 6)
        with pytest.raises(StoreError, match="is away"):
            worker.send_patiently()
        failing = 0


def test_a_checkpoint_that_could_not_be_got_is_got_later(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with driver_mirror(run, "the run") as driver:
        monkeypatch.setattr(mirror, "SYNC_SECONDS", 1000.0)
        with worker_mirror(run, 0) as worker:
            write_checkpoint(worker.run, 5)
        with monkeypatch.context() as away:
            away.setattr(StorePath, "download", lambda self, path: raise_store_error(self))
            with pytest.raises(StoreError):
                driver.sync()
        driver.sync()
        assert names(run.checkpoints) == {"checkpoint-5"}


def test_a_full_disk_of_the_copy_is_told(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(self: StorePath, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with driver_mirror(run, "the run") as driver:
        with worker_mirror(run, 0) as worker:
            worker.run.stacks.mkdir()
            (worker.run.stacks / "rank-0.txt").write_text("here")
            monkeypatch.setattr(StorePath, "download", download)
        with pytest.raises(FullDiskError, match=r"no space left .* with TMPDIR"):
            driver.sync()


def raise_store_error(path: StorePath) -> None:
    raise StoreError(f"{path}: is away")


def test_a_command_whose_run_was_taken_over_ends(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 1000.0)  # as one that is cut off
    with driver_mirror(run, "the run") as first, driver_mirror(copy_of(run, tmp_path / "other"), "the run"):
        monkeypatch.setattr(lease, "RENEW_SECONDS", 0.0)
        wait_for(lambda: first._error is not None)
        with pytest.raises(UserError, match="has taken it over"):
            first.sync()
