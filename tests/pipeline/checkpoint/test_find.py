"""Finding whole checkpoints: damaged ones are set aside, and none is used in silence."""

import logging
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from jobs.run import Pipeline
from pipeline import checkpoint
from pipeline.checkpoint.find import all_whole, newest_whole, set_aside
from pipeline.config.load import parse_config
from pipeline.data.manifest import Manifest
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.predict.detector import Detector
from pipeline.run_folder import RunFolder
from pipeline.train.loop import train
from pipeline.train.run import TrainJob, resume_point
from tests.builders import make_varied_manifest, without_sums
from tests.pipeline.train.runs import make_job

FILES = (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.EMA, checkpoint.STATE)
CHANGES = 200


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_varied_manifest(tmp_path_factory.mktemp("data"), 20, max_samples=6)


@pytest.fixture(scope="module")
def trained(manifest: Manifest, world: World, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """A run that averages its weights, with the checkpoints of step 1 and, its last, of step 2."""
    job = make_job(manifest, tmp_path_factory.mktemp("run"), max_steps=2, checkpoint_epochs=0.1, ema=0.9)
    train(job, world)
    return job


@pytest.fixture
def run(trained: TrainJob, tmp_path: Path) -> Path:
    """The run's checkpoints, to be damaged."""
    shutil.copytree(trained.out.checkpoints, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def change_byte(file: Path, place: int, by: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(place)
        value = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([value ^ by]))


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    run: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    change_byte(run / "checkpoint-2" / name, 100, 1)
    found = newest_whole(run)
    assert found is not None
    assert (found[0].name, found[1].step) == ("checkpoint-1", 1)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-1", "checkpoint-2.damaged"]
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert f"checkpoint-2/{name}: is not " in warning
    assert "checkpoint-2.damaged" in warning


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.EMA])
def test_a_checkpoint_without_a_file_is_set_aside(run: Path, name: str) -> None:
    (run / "checkpoint-2" / name).unlink()
    assert [path.name for path in all_whole(run)] == ["checkpoint-1"]
    assert (run / "checkpoint-2.damaged").is_dir()


def test_none_is_whole(run: Path) -> None:
    for path in checkpoint.checkpoints(run):
        (path / checkpoint.STATE).write_text("")
    assert newest_whole(run) is None
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-1.damaged", "checkpoint-2.damaged"]


def test_a_taken_name_gets_a_number(tmp_path: Path) -> None:
    for content in ("first", "second", "third"):
        (tmp_path / "checkpoint-2").mkdir()
        (tmp_path / "checkpoint-2" / checkpoint.STATE).write_text(content)
        set_aside(tmp_path / "checkpoint-2", "it is damaged")
    kept = {path.name: (path / checkpoint.STATE).read_text() for path in tmp_path.iterdir()}
    assert kept == {
        "checkpoint-2.damaged": "first",
        "checkpoint-2.damaged-2": "second",
        "checkpoint-2.damaged-3": "third",
    }


def test_another_format_is_not_set_aside(run: Path) -> None:
    without_sums(run / "checkpoint-2", lambda values: values.update(format=2))
    with pytest.raises(UserError, match="not of format 1"):
        newest_whole(run)
    assert (run / "checkpoint-2").is_dir()


def test_a_run_whose_last_checkpoint_is_damaged_is_not_done(trained: TrainJob, world: World, tmp_path: Path) -> None:
    job = TrainJob(trained.model, trained.train, trained.shards, RunFolder(tmp_path))
    shutil.copytree(trained.out.checkpoints, job.out.checkpoints)
    last = job.out.checkpoints / "checkpoint-2"
    change_byte(last / checkpoint.MODEL, -1 % (last / checkpoint.MODEL).stat().st_size, 4)
    assert train(job, world) == last
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):  # step 2 was done again, to the same bits
        assert (last / name).read_bytes() == (trained.out.checkpoints / "checkpoint-2" / name).read_bytes()
    assert (job.out.checkpoints / "checkpoint-2.damaged").is_dir()


def test_a_half_removed_checkpoint_is_none_and_goes(manifest: Manifest, world: World, tmp_path: Path) -> None:
    """Killed while an old checkpoint was being removed."""
    job = make_job(manifest, tmp_path, max_steps=2, checkpoint_epochs=0.1, keep_checkpoints=1)
    remove = shutil.rmtree

    def killed(path: Path, **options: bool) -> None:
        if path.name.startswith("checkpoint-1") and not options:
            (path / checkpoint.MODEL).unlink()
            raise KeyboardInterrupt
        remove(path, **options)

    with patch("shutil.rmtree", killed), pytest.raises(KeyboardInterrupt):
        train(job, world)
    last = job.out.checkpoints / "checkpoint-2"
    assert checkpoint.checkpoints(job.out.checkpoints) == [last]
    checkpoint.clean(job.out.checkpoints)
    assert list(job.out.checkpoints.iterdir()) == [last]


def make_pipeline(run: Path) -> Pipeline:
    sections = {"name": run.parent.name, "runs": str(run.parent.parent), "train": {"global_batch": 2}}
    return Pipeline(parse_config(sections, "test"))


def test_evaluating_and_registering_take_the_last_whole_one(run: Path) -> None:
    assert make_pipeline(run)._last_checkpoint().name == "checkpoint-2"
    change_byte(run / "checkpoint-2" / checkpoint.MODEL, 100, 1)
    assert make_pipeline(run)._last_checkpoint().name == "checkpoint-1"
    (run / "checkpoint-1" / checkpoint.OPTIMIZER).unlink()
    with pytest.raises(UserError, match="there is no whole checkpoint to use"):
        make_pipeline(run)._last_checkpoint()


@contextmanager
def changed(file: Path, place: int, by: int) -> Iterator[None]:
    change_byte(file, place, by)
    try:
        yield
    finally:
        for aside in file.parent.parent.glob("*.damaged"):
            aside.rename(aside.with_suffix(""))
        change_byte(file, place, by)


def outcome(use: Any) -> Any:
    try:
        return use()
    except UserError as error:
        return str(error)


def test_no_changed_byte_is_trained_on_or_answered_with(trained: TrainJob, manifest: Manifest, run: Path) -> None:
    """One byte at a time: the checkpoint is told, or its content is the same (white space of JSON)."""
    job = TrainJob(trained.model, trained.train, trained.shards, RunFolder(run.parent))
    last, drawn = run / "checkpoint-2", random.Random(0)
    content = checkpoint.read_state(last)
    told = 0
    for number in range(CHANGES):
        file = last / FILES[number % len(FILES)]
        with changed(file, drawn.randrange(file.stat().st_size), drawn.randrange(1, 256)):
            answers = outcome(lambda: Detector.from_checkpoint(last))
            found = outcome(lambda: resume_point(job, manifest))
            if isinstance(found, str) or found[0] != last:
                told += 1
                assert isinstance(answers, str) or file.name in (checkpoint.MODEL, checkpoint.OPTIMIZER)
                assert isinstance(found, str) or found[0].name == "checkpoint-1"
            else:
                assert file.name == checkpoint.STATE
                assert found[1] == content
    assert told > 0.9 * CHANGES
    assert resume_point(job, manifest) == (last, content)
