"""`raydetr replay`: what is told of a step, and its pictures."""

from pathlib import Path

import pytest
from PIL import Image

from jobs.replay import draw, lines, replay_step
from jobs.train import make_job
from pipeline.config.sections import Config
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.train.loop import train
from tests.builders import make_varied_manifest
from tests.pipeline.train.runs import MODEL, SETTINGS


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, world: World) -> Config:
    folder = tmp_path_factory.mktemp("replay")
    manifest = make_varied_manifest(folder / "data", 16)
    config = Config.model_validate(
        {
            "name": "run",
            "runs": str(folder / "runs"),
            "shards": {"out": str(manifest.folder.parent)},
            "model": MODEL,
            "train": {**SETTINGS, "max_steps": 4, "checkpoint_epochs": 1.0},
            "cluster": {"device": "cpu", "require_compiled": False},
        }
    )
    train(make_job(config, manifest), world)
    return config


def test_a_step_is_told_beside_what_was_recorded(trained: Config, tmp_path: Path) -> None:
    done = replay_step(trained, 3)
    assert done.checkpoint == "checkpoint-2"
    told = lines(done)
    assert told[0] == "step 3, 1 steps after checkpoint-2"
    (loss,) = (line.split() for line in told if line.startswith("loss "))
    assert float(loss[1]) == pytest.approx(float(loss[2]), rel=1e-5)
    images = [image for part in done.replayed.parts for image in part.micro.image_ids]
    assert draw(done, tmp_path / "out") == len(images) == 8
    for image in images:
        assert f"{image}" in " ".join(told)
        with Image.open(tmp_path / "out" / f"3-{image}.png") as picture:
            assert max(picture.size) <= 80


def test_before_the_first_checkpoint_it_begins_anew(trained: Config) -> None:
    assert lines(replay_step(trained, 0))[0] == "step 0, 0 steps after the start of training"


def test_another_run_is_refused(trained: Config) -> None:
    other = trained.model_copy(update={"train": trained.train.model_copy(update={"lr": 1.0})})
    with pytest.raises(UserError, match=r"was trained with other settings \(train\.lr"):
        replay_step(other, 3)
