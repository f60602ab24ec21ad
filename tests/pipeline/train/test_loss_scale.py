"""pipeline/train/loss_scale.py: fp16 with a scale of the loss that begins too large."""

import math
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoint.state import MODEL, OPTIMIZER, Scaling, read_state
from pipeline.data.manifest import Manifest
from pipeline.distributed import World
from pipeline.train.loop import train
from pipeline.train.loss_scale import LEAST, WINDOW, LossScale, loss_scale_of
from pipeline.train.replay import replay
from pipeline.train.run import TrainJob
from tests.pipeline.checkpoint.engines import assert_close, make_engine, make_state, save, step
from tests.pipeline.train.runs import make_job, points
from tests.ranks import Ranks

FIRST = 2.0**22
"""Overflows in the first two steps of `make_job`."""


def test_an_overflow_halves_it_and_steps_without_double_it() -> None:
    scale = LossScale(Scaling(8.0), 2)
    assert scale.mends(math.inf)
    assert not scale.mends(1.0)
    assert scale.follow(0, math.nan) == Scaling(4.0, steady=0, overflows=1)
    for number in range(WINDOW - 1):
        assert scale.follow(number, 1.0) == Scaling(4.0, number + 1, 1)
    assert scale.follow(WINDOW, 1.0) == Scaling(8.0, 0, 1)
    for number in range(5):
        scale.follow(number, math.inf)
    assert scale.scaling.factor == LEAST
    assert not scale.mends(math.inf)


def steps_of_net(
    world: World, stage: int, folder: Path, offload: str = "none", stop: int | None = None
) -> tuple[Path, Scaling]:
    """Five steps of a small engine from a scale that overflows at first; written and read again after `stop`."""
    engine, done = make_engine(world, stage, scaling=Scaling(2.0**18), offload=offload), 0
    for number in range(5):
        if number == stop:
            path, scaling = _saved(engine, world, folder / "before", number)
            engine = make_engine(world, stage, path, scaling, offload=offload)
        step(engine, world, number)
        done = number + 1
    return _saved(engine, world, folder, done)


def _saved(engine: Any, world: World, folder: Path, done: int) -> tuple[Path, Scaling]:
    scale = loss_scale_of(engine)
    assert scale is not None
    return save(engine, world, folder, make_state(done, engine, scaling=scale.scaling), None), scale.scaling


@pytest.mark.parametrize(
    ("stage", "offload"), [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "cpu"), (3, "cpu")]
)
def test_overflows_are_left_out_at_every_stage_and_the_scale_goes_on(
    ranks: Ranks, world: World, tmp_path: Path, stage: int, offload: str
) -> None:
    alone, scaling = steps_of_net(world, 0, tmp_path / "alone")
    assert 1 <= scaling.overflows < 5
    straight, of_ranks = ranks.run(steps_of_net, stage, tmp_path / "straight", offload)[0]
    assert of_ranks == scaling, "alike at any number of ranks"
    assert_close(straight, alone, 1e-3)
    steps = {float(tensor) for name, tensor in load_file(straight / OPTIMIZER).items() if name.endswith("/step")}
    assert steps == {5 - scaling.overflows}
    again, after = ranks.run(steps_of_net, stage, tmp_path / "again", offload, 1)[0]
    assert after == scaling
    assert_close(again, straight, 0)


@pytest.fixture(scope="module")
def trained(manifest: Manifest, world: World, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """Three steps, of which two overflow, with a checkpoint after each."""
    out = tmp_path_factory.mktemp("fp16")
    job = make_job(manifest, out, precision="fp16", max_steps=3, checkpoint_epochs=0.4, keep_checkpoints=None, ema=0.9)
    with patch("pipeline.train.engine.Scaling", partial(Scaling, FIRST)):
        train(job, world)
    return job


def test_an_overflow_is_told_and_changes_no_weight(trained: TrainJob) -> None:
    told = points(trained.out)
    assert [told[number]["train/loss_scale"] for number in (1, 2, 3)] == [FIRST, FIRST / 2, FIRST / 4]
    assert [told[number]["train/overflows"] for number in (1, 2, 3)] == [1, 2, 2]
    assert ["train/grad_norm" in told[number] for number in (1, 2, 3)] == [False, False, True]
    first, second, third = (load_file(trained.out.checkpoints / f"checkpoint-{n}" / MODEL) for n in (1, 2, 3))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, third[name]) for name, tensor in first.items())


def test_a_step_that_is_replayed_has_the_scale_that_it_had(trained: TrainJob, world: World) -> None:
    path = trained.out.checkpoints / "checkpoint-2"
    state = read_state(path)
    assert state.scaling == Scaling(FIRST / 4, steady=0, overflows=2)
    replayed = replay(trained, world, 2, (path, state))
    assert replayed.grad_norm == pytest.approx(points(trained.out)[3]["train/grad_norm"], rel=1e-6)
    assert sum(norm**2 for norm in replayed.gradients.values()) ** 0.5 == pytest.approx(replayed.grad_norm, rel=1e-4)
