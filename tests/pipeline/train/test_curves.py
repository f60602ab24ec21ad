"""The training curves: which steps have a point, each once."""

import re
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from pipeline.config.sections import TrainSection
from pipeline.data.manifest import Manifest
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.tracking.spool import Spool, SpoolReader
from pipeline.train.curves import Curves
from pipeline.train.loop import train
from pipeline.train.run import TrainJob
from tests.builders import disk_of, make_varied_manifest
from tests.pipeline.train.test_loop import make_job, train_on
from tests.ranks import Ranks

TRAIN = TrainSection(global_batch=4, micro_batch=2, log_steps=3)


def write_steps(spool: Path | None, first: int, last: int, loss: float = 1.0) -> None:
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "name": "main", "lr": 0.5}])
    curves = Curves(spool, TRAIN, total=8, epochs=lambda steps: steps / 2, first=first)
    for step in range(first, last):
        curves.step_done(step, {"loss": loss, "grad_norm": 2.0}, optimizer)
    curves.close()


def test_the_first_the_last_and_every_third_step_have_a_point(tmp_path: Path) -> None:
    write_steps(tmp_path / "train.jsonl", 0, 8)
    records = SpoolReader(tmp_path / "train.jsonl").read()
    assert [record.step for record in records] == [1, 3, 6, 8]
    metrics = records[1].metrics
    assert {name: metrics[f"train/{name}"] for name in ("loss", "grad_norm", "epoch", "lr_main")} == {
        "loss": 1.0,
        "grad_norm": 2.0,
        "epoch": 1.5,
        "lr_main": 0.5,
    }
    assert metrics["train/images_per_second"] > 0
    assert metrics["train/hours_left"] > 0
    assert records[-1].metrics["train/hours_left"] == 0


def test_the_share_of_the_time_that_is_waited_for_data(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "name": "main", "lr": 0.5}])
    curves = Curves(tmp_path / "train.jsonl", TRAIN, total=8, epochs=lambda steps: steps / 2, first=0)
    for step in range(6):
        if step == 4:
            with curves.waiting():
                time.sleep(0.2)
        curves.step_done(step, {"loss": 1.0, "grad_norm": 2.0}, optimizer)
    curves.close()
    waits = [record.metrics["train/data_wait"] for record in SpoolReader(tmp_path / "train.jsonl").read()]
    assert waits[:2] == [0, 0]
    assert 0.5 < waits[2] <= 1


@pytest.mark.parametrize(("loss", "steps"), [(1.0, [1, 3, 6, 8]), (1.5, [1, 3, 3, 6, 8])], ids=["same", "another loss"])
def test_a_step_that_is_done_again_has_one_point(tmp_path: Path, loss: float, steps: list[int]) -> None:
    write_steps(tmp_path / "train.jsonl", 0, 4)
    write_steps(tmp_path / "train.jsonl", 2, 8, loss)
    assert [record.step for record in SpoolReader(tmp_path / "train.jsonl").read()] == steps


def test_the_part_of_the_time_that_a_card_would_need(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "name": "main", "lr": 0.5}])
    seconds = iter([0.0, 4.0, 5.0, 6.0])
    with patch("pipeline.train.curves.time.perf_counter", lambda: next(seconds)):
        curves = Curves(tmp_path / "train.jsonl", TRAIN, 4, float, 0, lambda canvases: sum(h * w for h, w in canvases))
        for step in range(4):
            curves.step_done(step, {"loss": 1.0, "grad_norm": 2.0}, optimizer, [(0.1, 1), (0.1, 2)])  # type: ignore[list-item]
    curves.close()
    records = SpoolReader(tmp_path / "train.jsonl").read()
    assert [record.metrics["train/model_flop_utilisation"] for record in records] == pytest.approx([0.3 / 4, 0.6, 0.3])


def test_another_rank_writes_nothing(tmp_path: Path) -> None:
    write_steps(None, 0, 8)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_varied_manifest(tmp_path_factory.mktemp("data"), 20, max_samples=6)


def train_on_a_disk_of(world: World, job: TrainJob, size: int) -> Path:
    with disk_of(size):
        return train(job, world)


def test_a_full_disk_stops_all_ranks(manifest: Manifest, ranks: Ranks, tmp_path: Path) -> None:
    """The first point has room, the second has not; rank 1 writes nothing, and DeepSpeed small files alone."""
    job = make_job(manifest, tmp_path, checkpoint_epochs=99)
    with Spool(job.out.train_spool) as spool:
        spool.write(0, {"x" * 100_000: 0.0})
    outcomes = ranks.outcomes(train_on_a_disk_of, job, job.out.train_spool.stat().st_size + 600)
    assert [str(outcome) for outcome in outcomes] == [
        f"{job.out.train_spool}: no space left (File too large); free some, or write elsewhere with runs"
    ] * 2
    assert all(isinstance(outcome, UserError) for outcome in outcomes)
    assert [record.step for record in SpoolReader(job.out.train_spool).read()] == [0, 1]


def test_a_spool_that_cannot_be_opened_stops_all_ranks(manifest: Manifest, ranks: Ranks, tmp_path: Path) -> None:
    job = make_job(manifest, tmp_path)
    job.out.train_spool.parent.touch()
    outcomes = ranks.outcomes(train_on, job)
    assert all(isinstance(outcome, UserError) for outcome in outcomes)
    assert str(outcomes[0]) == str(outcomes[1])
    assert re.search(r"spool: cannot be written \(.*\); set runs", str(outcomes[0]))


def train_without_points(world: World, job: TrainJob) -> Path:
    with patch.object(Spool, "write_once", side_effect=UserError("no room for a point")):
        return train(job, world)


def test_the_point_of_the_last_step_is_told_on_all_ranks(manifest: Manifest, ranks: Ranks, tmp_path: Path) -> None:
    job = make_job(manifest, tmp_path, max_steps=1)
    outcomes = ranks.outcomes(train_without_points, job)
    assert [str(outcome) for outcome in outcomes] == ["no room for a point"] * 2
    assert (job.out.checkpoints / "checkpoint-1").is_dir()
