"""A step once more: the numbers that the run had, with nothing of it changed."""

import pytest
import torch
from torch import nn

from pipeline.checkpoint.state import read_state
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.train.loop import train
from pipeline.train.replay import _watched, replay
from pipeline.train.run import TrainJob
from tests.builders import make_varied_manifest
from tests.pipeline.train.runs import SAMPLES, make_job, points


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, world: World) -> TrainJob:
    """A run of 8 steps with checkpoints after 3, 5 and 8."""
    folder = tmp_path_factory.mktemp("replay")
    job = make_job(make_varied_manifest(folder / "data", SAMPLES, max_samples=6), folder / "run", zero_stage=1)
    train(job, world)
    return job


@pytest.mark.parametrize(("number", "checkpoint"), [(6, 5), (5, 5), (1, None)])
def test_the_numbers_of_the_run_come_again(
    number: int, checkpoint: int | None, trained: TrainJob, world: World
) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.out.path.rglob("*")}
    found = None
    if checkpoint is not None:
        path = trained.out.checkpoints / f"checkpoint-{checkpoint}"
        found = path, read_state(path)
    redone: list[int] = []
    step = replay(trained, world, number, found, redone.append)
    assert redone == list(range(checkpoint or 0, number))
    recorded = points(trained.out)[number + 1]
    assert {f"train/{name}": pytest.approx(value, rel=1e-6) for name, value in step.losses.items()} == {
        name: recorded[name] for name in recorded if name.removeprefix("train/") in step.losses
    }
    assert step.grad_norm == pytest.approx(recorded["train/grad_norm"], rel=1e-6)
    assert sum(value**2 for value in step.gradients.values()) ** 0.5 == pytest.approx(step.grad_norm, rel=1e-4)
    assert list(step.gradients.values()) == sorted(step.gradients.values(), reverse=True)
    assert sum(part.losses["loss"] for part in step.parts) == pytest.approx(step.losses["loss"])
    assert sum(len(part.micro.image_ids) for part in step.parts) == trained.train.global_batch
    assert step.not_finite == []
    assert before == {path: path.stat().st_mtime_ns for path in trained.out.path.rglob("*")}


def test_a_step_that_there_is_not(trained: TrainJob, world: World) -> None:
    with pytest.raises(UserError, match="step 8: the schedule has the steps 0 to 7"):
        replay(trained, world, 8, None)


def test_the_first_output_that_is_not_finite_is_named() -> None:
    class Spoilt(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"x": x / 0}

    class Last(nn.Module):
        def forward(self, x: dict[str, torch.Tensor]) -> tuple[torch.Tensor]:
            return (x["x"] * 2,)

    network, names = nn.Sequential(nn.Linear(2, 2), Spoilt(), Last()), []  # type: ignore[var-annotated]
    with _watched(network, names):
        network(torch.ones(1, 2))
    network(torch.ones(1, 2))
    assert names == ["1", "2"]
