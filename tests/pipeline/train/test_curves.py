"""The training curves: which steps have a point, each once."""

from pathlib import Path

import pytest
import torch

from pipeline.config.sections import TrainSection
from pipeline.tracking.spool import SpoolReader
from pipeline.train.curves import Curves

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


@pytest.mark.parametrize(("loss", "steps"), [(1.0, [1, 3, 6, 8]), (1.5, [1, 3, 3, 6, 8])], ids=["same", "another loss"])
def test_a_step_that_is_done_again_has_one_point(tmp_path: Path, loss: float, steps: list[int]) -> None:
    write_steps(tmp_path / "train.jsonl", 0, 4)
    write_steps(tmp_path / "train.jsonl", 2, 8, loss)
    assert [record.step for record in SpoolReader(tmp_path / "train.jsonl").read()] == steps


def test_another_rank_writes_nothing(tmp_path: Path) -> None:
    write_steps(None, 0, 8)
    assert not list(tmp_path.iterdir())
