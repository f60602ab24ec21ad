"""What a follower sees of the command that trains; tests/clusters/test_follow.py has both."""

import json
import logging
from pathlib import Path

import pytest

import jobs.follow
from jobs.follow import _Training, _with_scores
from pipeline.config.sections import Config
from pipeline.data.labels import Category, LabelMap
from pipeline.evaluate.claims import Claims
from pipeline.mirror import driver_mirror
from pipeline.run_folder import RunFolder
from pipeline.store import StorePath
from pipeline.train.scores import scored
from tests.builders import write_checkpoint
from tests.jobs.test_evaluate import make_config

LABELS = LabelMap("contiguous", (Category(1, "cat"),))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.follow, "DRIVER_SECONDS", 0.0)


def training_of(config: Config) -> _Training:
    return _Training(config, Claims(config.folder, "follower"), 10)


def test_it_is_over_with_the_last_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(tmp_path)
    training = training_of(config)
    with caplog.at_level(logging.INFO):
        assert not training.is_over()
        write_checkpoint(config.folder.checkpoints, LABELS, 5)
        assert not training.is_over()
        with driver_mirror(config.folder, "the run"):
            assert not training.is_over()
            write_checkpoint(config.folder.checkpoints, LABELS, 10)
            assert training.is_over()
    told = [record.getMessage() for record in caplog.records if record.name.startswith("raydetr")]
    assert len(told) == 2
    assert "no command trains" in told[0]
    assert "a command works on" in told[1]


def test_it_is_over_when_patience_is(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config = config.model_copy(update={"train": config.train.model_copy(update={"patience": 2})})
    for step, value in ((2, 0.5), (4, 0.4), (6, 0.3)):
        write_checkpoint(config.folder.checkpoints, LABELS, step)
        assert not training_of(config).is_over()
        file = config.folder.evaluation / f"checkpoint-{step}" / "metrics.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"AP": value}))
    with driver_mirror(config.folder, "the run"):  # which may go on
        assert not training_of(config).is_over()
    assert training_of(config).is_over()


def test_the_scores_of_a_run_in_a_store(s3_folder: StorePath, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "copy", s3_folder / "run")
    for name in ("checkpoint-5/metrics.json", "checkpoint-5/detections.json", "subset-20/checkpoint-10/metrics.json"):
        (s3_folder / "run" / "evaluate" / name).write_bytes(b'{"AP": 0.5}')
    copy = _with_scores(run, tmp_path / "scores")
    assert (scored(copy, "AP"), scored(copy, "AP", 20)) == ({"checkpoint-5": 0.5}, {"checkpoint-10": 0.5})
    assert not list((tmp_path / "scores").rglob("detections.json"))
