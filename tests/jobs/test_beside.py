"""Evaluation beside training, on a real Ray: where there is room, and without harm where something is in its way."""

import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from jobs.beside import EvaluationBeside
from jobs.cluster import connected
from jobs.evaluate import evaluate, tell_scores
from jobs.register import best_checkpoint
from pipeline.checkpoint.state import MODEL
from pipeline.config.sections import METRICS
from pipeline.data.manifest import Manifest
from pipeline.errors import UserError
from pipeline.evaluate.claims import Claims, following
from pipeline.mirror import driver_mirror
from pipeline.tracking.spool import SpoolReader
from tests.builders import make_varied_manifest, write_checkpoint
from tests.jobs.test_evaluate import make_config
from tests.jobs.test_scoring import scorers

WAIT_SECONDS = 120


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[None]:
    with connected(make_config(Path("runs")).cluster):
        yield


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_varied_manifest(tmp_path_factory.mktemp("split"), 7)


@pytest.fixture
def checkpoints(split: Manifest, tmp_path: Path) -> Path:
    """The folder of two checkpoints of a run."""
    folder = tmp_path / "run" / "checkpoints"
    for step in (5, 10):
        write_checkpoint(folder, split.labels, step, seed=step)
    return folder


class Scores(dict[str, dict[str, Any]]):
    """What was scored, by the checkpoint's name."""

    def __call__(self, name: str, metrics: dict[str, Any]) -> None:
        assert name not in self
        self[name] = metrics

    def wait(self, beside: EvaluationBeside, count: int) -> None:
        end = time.monotonic() + WAIT_SECONDS
        while len(self) < count and time.monotonic() < end:
            beside.begin()
            beside.collect(0.1)
        assert len(self) == count


def test_the_scores_are_those_of_the_end(split: Manifest, checkpoints: Path) -> None:
    """Each once, the newest first; and the end finds them."""
    config, scores = make_config(checkpoints.parents[1], verify=False, train_sample=3), Scores()
    with EvaluationBeside(config, split, scores, split) as beside:
        scores.wait(beside, 2)
        beside.begin()
    assert list(scores) == ["checkpoint-10", "checkpoint-5"]
    written = config.folder.scores()["checkpoint-10"].stat().st_mtime_ns
    metrics = evaluate(config, checkpoints / "checkpoint-10", split, None, split)
    assert {name: scores["checkpoint-10"][name] for name in METRICS} == {name: metrics[name] for name in METRICS}
    assert config.folder.scores()["checkpoint-10"].stat().st_mtime_ns == written
    assert scores["checkpoint-10"]["train_sample"]["images"] == 3
    shutil.rmtree(config.folder.evaluation)
    assert evaluate(config, checkpoints / "checkpoint-10", split, None, split) == scores["checkpoint-10"]
    evaluate(config, checkpoints / "checkpoint-5", split, None, split)
    again = Scores()
    with EvaluationBeside(config, split, again) as beside:
        beside.begin()
    assert not again


def test_some_checkpoints_on_some_images(split: Manifest, checkpoints: Path) -> None:
    """Of steps 5 and 10 of 10 every third is the last alone; the end scores it, and the best, on all images."""
    config, scores = make_config(checkpoints.parents[1], every=3, subset=3, verify=False), Scores()
    config = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 10})})
    with EvaluationBeside(config, split, scores, samples=10) as beside:
        beside.begin()
        scores.wait(beside, 1)
        beside.begin()
    assert list(scores) == ["checkpoint-10"]
    assert scores["checkpoint-10"]["inputs"]["subset"] == 3
    assert config.folder.scores(3).keys() == {"checkpoint-10"}
    assert not config.folder.scores()
    best = config.folder.results(3) / "checkpoint-5" / "metrics.json"
    best.parent.mkdir()
    best.write_text('{"AP": 1.0}')
    metrics = evaluate(config, checkpoints / "checkpoint-10", split, None)
    assert config.folder.scores().keys() == {"checkpoint-5", "checkpoint-10"}
    assert best_checkpoint(config, checkpoints / "checkpoint-10", metrics)[1]["inputs"].keys() == {
        "weights",
        "val_digest",
        "settings",
    }
    curves = [set(point.metrics) for point in SpoolReader(config.folder.evaluate_spool).read()]
    assert all("val/AP" in curve and "val_subset/AP" not in curve for curve in curves)
    tell_scores(config.folder, "checkpoint-10", scores["checkpoint-10"])
    part = SpoolReader(config.folder.evaluate_spool).read()[-1].metrics
    assert part["val_subset/AP"] == scores["checkpoint-10"]["AP"]
    assert {name for name in part if not name.partition("/")[0].endswith(("_subset", "_subset_category"))} == set()


def test_what_a_follower_scores_comes_home(split: Manifest, checkpoints: Path) -> None:
    """Two at a time, each by one of both, and the file is that of one command."""
    config, left, scores, home = make_config(checkpoints.parents[1], verify=False), Scores(), Scores(), Scores()
    run = config.folder
    driver, follower = Claims(run, "driver"), Claims(run, "follower")
    with driver_mirror(run, "the run"), following(run, "following the run"):
        with EvaluationBeside(config, split, scores, claims=driver) as beside:
            beside.begin()
            with EvaluationBeside(config, split, left, claims=follower, at_once=2) as other:
                assert [path.name for path in other.due()] == ["checkpoint-5", "checkpoint-10"]
                other.begin()
                other.begin()
                assert not other.is_idle
        assert (list(scores), list(left)) == (["checkpoint-10"], ["checkpoint-5"])
        assert run.scores().keys() == {"checkpoint-10"}
        driver.take_home(home)
    assert home == left
    assert run.scores().keys() == {"checkpoint-5", "checkpoint-10"}
    written = {name: file.read_bytes() for name, file in run.scores().items()}
    shutil.rmtree(run.evaluation)
    with EvaluationBeside(config, split, Scores()) as beside:
        Scores().wait(beside, 0)
        beside.begin()
    assert run.scores()["checkpoint-10"].read_bytes() == written["checkpoint-10"]


def test_a_subset_is_smaller_than_the_split(split: Manifest, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.subset 7: .* has 7 images; give fewer"):
        EvaluationBeside(make_config(tmp_path, subset=7), split, Scores())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(split: Manifest, checkpoints: Path) -> None:
    config = make_config(checkpoints.parents[1], device="cuda", gpus=0.25)
    for score in (
        lambda: EvaluationBeside(config, split, Scores()),
        lambda: evaluate(config, checkpoints / "checkpoint-10", split, None),
    ):
        with pytest.raises(UserError, match=r"evaluate\.device cuda with evaluate\.gpus 0\.25: .* has 0 GPUs"):
            score()


def test_what_runs_at_the_end_is_waited_for(split: Manifest, checkpoints: Path) -> None:
    config, scores = make_config(checkpoints.parents[1]), Scores()
    with EvaluationBeside(config, split, scores) as beside:
        beside.begin()
    assert list(scores) == ["checkpoint-10"]


def test_a_lost_process_stops_nothing(split: Manifest, checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, scores = make_config(checkpoints.parents[1]), Scores()
    with caplog.at_level(logging.WARNING), EvaluationBeside(config, split, scores) as beside:
        beside.begin()
        while not (begun := scorers("evaluate")):
            time.sleep(0.01)
        begun[0].kill()
        while not beside.is_idle:
            beside.collect(1)
        assert "evaluate: checkpoint-10 beside training: " in caplog.text
        beside.begin()
    assert list(scores) == ["checkpoint-5"]


def test_one_that_waits_for_a_checkpoint_gives_its_room_back(
    split: Manifest, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training may be what needs it, and look for room without asking for the next one to be scored."""
    monkeypatch.setattr("jobs.beside.IDLE_SECONDS", 0.5)
    config, scores = make_config(checkpoints.parents[1]), Scores()
    with EvaluationBeside(config, split, scores) as beside:
        beside.begin()
        scores.wait(beside, 1)
        assert scorers()
        end = time.monotonic() + 60
        while scorers() and time.monotonic() < end:
            beside.collect(0.1)
        assert not scorers()
        beside.begin()
    assert list(scores) == ["checkpoint-10", "checkpoint-5"]


def test_without_room_nothing_begins(split: Manifest, checkpoints: Path) -> None:
    @ray.remote(num_cpus=ray.cluster_resources()["CPU"])
    class All:
        def ready(self) -> None:
            pass

    everything = All.remote()
    ray.get(everything.ready.remote())
    scores = Scores()
    with EvaluationBeside(make_config(checkpoints.parents[1]), split, scores) as beside:
        beside.begin()
        beside.collect(1)
    assert not scores
    ray.kill(everything)
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        time.sleep(0.1)


def test_what_fails_stops_nothing_and_what_is_gone_is_not_missed(
    split: Manifest, checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, scores = make_config(checkpoints.parents[1]), Scores()
    (checkpoints / "checkpoint-10" / MODEL).write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING), EvaluationBeside(config, split, scores) as beside:
        beside.begin()
        shutil.rmtree(checkpoints / "checkpoint-5")
    assert not scores
    told = [record.getMessage() for record in caplog.records if record.name.startswith("raydetr")]
    assert len(told) == 1
    assert told[0].startswith("evaluate: checkpoint-10 beside training: ")
    assert f"{MODEL}: is not" in told[0]
    caplog.clear()
    write_checkpoint(checkpoints, split.labels, 15, seed=1)
    with caplog.at_level(logging.WARNING), EvaluationBeside(config, split, scores) as beside:
        beside._done.add("checkpoint-10")
        beside.begin()
        shutil.rmtree(checkpoints / "checkpoint-15")
    assert set(scores) <= {"checkpoint-15"}
    assert not [record for record in caplog.records if record.name.startswith("raydetr")]
