"""The moving average of the weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs.convert import convert
from model import build_model
from pipeline import checkpoint
from pipeline.data.manifest import Manifest
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.evaluate.results import weights_digest
from pipeline.files import sha256_of
from pipeline.predict.detector import Detector
from pipeline.train.ema import decay_after
from pipeline.train.loop import train
from pipeline.train.run import TrainJob
from tests.builders import without_sums
from tests.pipeline.train.runs import assert_same_weights, losses, make_job, train_on
from tests.ranks import Ranks

DECAY = 0.6
"""Reached after 12 steps; a step of it is seen."""


@pytest.fixture(scope="module")
def averaged(manifest: Manifest, world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainJob, Path]:
    """The undisturbed run with an average, every step of it kept."""
    out = tmp_path_factory.mktemp("averaged")
    job = make_job(manifest, out, ema=DECAY, checkpoint_epochs=0.1, keep_checkpoints=None, freeze_backbone="all")
    return job, train(job, world)


@pytest.mark.parametrize(("steps", "kept"), [(1, 2 / 11), (8, 0.5), (90, 0.91), (10**6, 0.9997)])
def test_the_decay_rises(steps: int, kept: float) -> None:
    assert decay_after(steps, 0.9997) == pytest.approx(kept)


def test_it_is_the_average_of_the_weights_of_all_steps(averaged: tuple[TrainJob, Path]) -> None:
    job, _ = averaged
    torch.manual_seed(job.train.seed)
    expected = {name: tensor.double() for name, tensor in build_model(job.model).state_dict().items()}
    paths = checkpoint.checkpoints(job.out.checkpoints)
    assert len(paths) == 8
    for step, path in enumerate(paths, start=1):
        weights, kept = load_file(path / checkpoint.MODEL), decay_after(step, DECAY)
        expected = {name: kept * tensor + (1 - kept) * weights[name] for name, tensor in expected.items()}
        average = load_file(path / checkpoint.EMA)
        assert average.keys() == weights.keys()
        for name, tensor in average.items():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-7)
    differing = {name for name, tensor in average.items() if not torch.equal(tensor, weights[name])}
    trained = {key.rpartition("/")[0] for key in load_file(path / checkpoint.OPTIMIZER)}
    assert trained <= differing, "what is trained is averaged"
    assert not [name for name in differing if name.startswith("backbone.")], "what is frozen is what it is"


def test_training_does_not_see_it(
    manifest: Manifest, averaged: tuple[TrainJob, Path], world: World, tmp_path: Path
) -> None:
    without = make_job(manifest, tmp_path, freeze_backbone="all")
    assert_same_weights(train(without, world), averaged[1])
    assert losses(without.out) == losses(averaged[0].out)
    assert not (without.out.checkpoints / averaged[1].name / checkpoint.EMA).exists()


def test_a_run_that_goes_on_ends_with_the_same_bits(
    manifest: Manifest, averaged: tuple[TrainJob, Path], world: World, tmp_path: Path
) -> None:
    for steps in (3, 8):
        last = train(make_job(manifest, tmp_path, ema=DECAY, freeze_backbone="all", max_steps=steps), world)
    assert_same_weights(last, averaged[1])
    ours, theirs = load_file(last / checkpoint.EMA), load_file(averaged[1] / checkpoint.EMA)
    assert not [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]


@pytest.mark.parametrize("stage", [0, 1])
def test_it_is_the_same_at_two_ranks(
    manifest: Manifest, averaged: tuple[TrainJob, Path], ranks: Ranks, tmp_path: Path, stage: int
) -> None:
    for steps in (3, 8):
        job = make_job(manifest, tmp_path, ema=DECAY, freeze_backbone="all", max_steps=steps, zero_stage=stage)
        last = ranks.run(train_on, job)[0]
    ours, theirs = load_file(last / checkpoint.EMA), load_file(averaged[1] / checkpoint.EMA)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


def test_it_is_what_is_evaluated_served_converted_and_begun_with(
    manifest: Manifest, averaged: tuple[TrainJob, Path], world: World, tmp_path: Path
) -> None:
    _, path = averaged
    average = load_file(path / checkpoint.EMA)
    assert weights_digest(path) == sha256_of(path / checkpoint.EMA)
    served = Detector.from_checkpoint(path).model.state_dict()
    assert all(torch.equal(served[name], tensor) for name, tensor in average.items())
    convert(path, tmp_path / "out.safetensors", "raydetr")
    converted = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(tensor, average[name]) for name, tensor in converted.items())
    still = {"lr": 1e-12, "lr_backbone": 0, "lr_sampling_factor": 0, "weight_decay": 0, "max_steps": 1}
    begun = checkpoint.load_model_weights(
        train(make_job(manifest, tmp_path / "run", init={"weights": str(path)}, **still), world)
    )
    for name, tensor in average.items():
        torch.testing.assert_close(begun[name], tensor, rtol=0, atol=1e-10)


def test_a_run_cannot_begin_to_average(
    manifest: Manifest, averaged: tuple[TrainJob, Path], world: World, tmp_path: Path
) -> None:
    train(make_job(manifest, tmp_path, max_steps=1), world)
    with pytest.raises(UserError, match=r"train\.ema: None -> 0\.6"):
        train(make_job(manifest, tmp_path, ema=DECAY, max_steps=2), world)


def test_an_average_of_another_model_is_refused_by_name(manifest: Manifest, ranks: Ranks, tmp_path: Path) -> None:
    job = make_job(manifest, tmp_path, ema=DECAY, max_steps=1)
    path = ranks.run(train_on, job)[0]
    without_sums(path)
    (path / checkpoint.EMA).write_bytes((path / checkpoint.OPTIMIZER).read_bytes())
    outcomes = ranks.outcomes(train_on, make_job(manifest, tmp_path, ema=DECAY, max_steps=2))
    assert all("ema.safetensors: not the averages of its model: " in str(outcome) for outcome in outcomes)
