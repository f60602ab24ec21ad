"""The optimizer's state: the same at any world size and ZeRO stage."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import checkpoint
from pipeline.data.manifest import Manifest
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.train.loop import train
from pipeline.train.run import TrainJob
from tests.builders import make_varied_manifest, without_sums
from tests.pipeline.checkpoint.engines import STEPS, assert_close, go_on, make_engine, make_state, save_after_steps
from tests.pipeline.train.runs import make_job, train_on
from tests.ranks import Ranks


@pytest.fixture(scope="module")
def later(world: World, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two more steps in the engine of one rank at stage 0."""
    folder = tmp_path_factory.mktemp("later")
    go_on(world, 0, saved, folder)
    return folder / "later" / f"checkpoint-{STEPS + 2}"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stages_and_world_sizes_write_the_same(
    world: World, ranks: Ranks, saved: Path, stage: int, tmp_path: Path
) -> None:
    assert_close(save_after_steps(world, stage, tmp_path / "one"), saved, 1e-6)
    assert_close(ranks.run(save_after_steps, stage, tmp_path / "two")[0], saved, 1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2], ids=["1 rank", "2 ranks"])
def test_it_loads_at_any_world_size_and_stage(
    world: World, ranks: Ranks, saved: Path, later: Path, size: int, stage: int, tmp_path: Path
) -> None:
    again = go_on(world, stage, saved, tmp_path) if size == 1 else ranks.run(go_on, stage, saved, tmp_path)[0]
    assert_close(again, saved, 0)
    assert_close(tmp_path / "later" / f"checkpoint-{STEPS + 2}", later, 1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_it_loads_where_the_optimizer_lies_on_the_host_and_back(
    ranks: Ranks, saved: Path, later: Path, stage: int, tmp_path: Path
) -> None:
    again = ranks.run(go_on, stage, saved, tmp_path / "there", "cpu")[0]
    assert_close(again, saved, 0)
    assert_close(tmp_path / "there" / "later" / f"checkpoint-{STEPS + 2}", later, 1e-6)
    assert_close(ranks.run(go_on, stage, again, tmp_path / "back")[0], saved, 0)


def test_other_group_settings_are_found(world: World, saved: Path) -> None:
    engine = make_engine(world, 0, saved)
    groups = tuple({**group, "weight_decay": 0.0} for group in checkpoint.group_settings(engine.basic_optimizer))
    with pytest.raises(UserError, match=r"state\.json: other .* groups .*groups\.0\.weight_decay: 0\.0 -> 0\.0001"):
        checkpoint.restore_optimizer(engine, world, saved, make_state(STEPS, groups=groups))


@pytest.mark.parametrize("stage", [1, 3])
def test_weights_that_are_not_the_saved_ones_are_found(world: World, saved: Path, stage: int) -> None:
    engine = make_engine(world, stage)
    with pytest.raises(UserError, match=r"model\.safetensors: .* is not the saved one"):
        checkpoint.restore_optimizer(engine, world, saved, make_state(STEPS, engine))


def test_a_damaged_file_is_refused_by_name(world: World, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    os.truncate(tmp_path / checkpoint.OPTIMIZER, (saved / checkpoint.OPTIMIZER).stat().st_size - 7)
    with pytest.raises(UserError, match=rf"{checkpoint.OPTIMIZER}: cannot be read"):
        make_engine(world, 0, tmp_path)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_varied_manifest(tmp_path_factory.mktemp("data"), 20, max_samples=6)


@pytest.fixture(scope="module")
def begun(manifest: Manifest, world: World, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """A run of one step."""
    job = make_job(manifest, tmp_path_factory.mktemp("run"), max_steps=1)
    train(job, world)
    return job


@pytest.fixture
def copy(begun: TrainJob, tmp_path: Path) -> Path:
    """Its checkpoint in another run's folder, without sums."""
    shutil.copytree(begun.out.checkpoints, tmp_path / "checkpoints")
    without_sums(tmp_path / "checkpoints" / "checkpoint-1")
    return tmp_path / "checkpoints" / "checkpoint-1"


def change_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def trainable(path: Path) -> str:
    """Name of a parameter that has moments."""
    return next(iter(load_file(path / checkpoint.OPTIMIZER))).rpartition("/")[0]


CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor], str], Any], str]] = {
    "a missing moment": (lambda t, name: t.pop(f"{name}/exp_avg"), "cannot be read .*{name}/exp_avg"),
    "a missing step": (lambda t, name: t.pop(f"{name}/step"), "cannot be read .*{name}/step"),
    "another shape": (lambda t, name: t.update({f"{name}/exp_avg": torch.zeros(3)}), r"{name}/exp_avg is .* \[3\]"),
    "another type": (
        lambda t, name: t.update({f"{name}/exp_avg": t[f"{name}/exp_avg"].half()}),
        r"{name}/exp_avg is torch\.float16",
    ),
    "another step": (
        lambda t, name: t.update({f"{name}/step": torch.tensor(7.0)}),
        r"{name}/step is 7\.0, state\.json says 1",
    ),
}


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("kind", CHANGES)
def test_moments_that_do_not_fit(
    manifest: Manifest, world: World, copy: Path, tmp_path: Path, stage: int, kind: str
) -> None:
    change, message = CHANGES[kind]
    name = trainable(copy)
    change_tensors(copy / checkpoint.OPTIMIZER, lambda tensors: change(tensors, name))
    expected = rf"checkpoint-1/optimizer\.safetensors: {message.replace('{name}', name)}"
    with pytest.raises(UserError, match=expected):
        train(make_job(manifest, tmp_path, max_steps=2, zero_stage=stage), world)


@pytest.mark.parametrize("kind", ["missing", "another shape"])
def test_weights_that_do_not_fit(manifest: Manifest, world: World, copy: Path, tmp_path: Path, kind: str) -> None:
    name = trainable(copy)
    change_tensors(
        copy / checkpoint.MODEL,
        lambda tensors: tensors.pop(name) if kind == "missing" else tensors.update({name: torch.zeros(3)}),
    )
    with pytest.raises(UserError, match=rf"checkpoint-1/model\.safetensors: not the weights .*{name}"):
        train(make_job(manifest, tmp_path, max_steps=2), world)


def test_all_ranks_end_with_the_same_error(manifest: Manifest, ranks: Ranks, copy: Path, tmp_path: Path) -> None:
    without_sums(copy, lambda values: values["groups"][0].update(weight_decay=0.5))
    outcomes = ranks.outcomes(train_on, make_job(manifest, tmp_path, max_steps=2))
    assert str(outcomes[0]) == str(outcomes[1])
    assert all(isinstance(outcome, UserError) for outcome in outcomes)
    assert "checkpoint-1/state.json: other parameter groups" in str(outcomes[0])
    assert "groups.0.weight_decay: 0.5 -> 0.0001" in str(outcomes[0])


def test_what_initial_weights_are_taken_from_is_checked(
    begun: TrainJob, manifest: Manifest, world: World, tmp_path: Path
) -> None:
    source = tmp_path / "checkpoint-1"
    shutil.copytree(begun.out.checkpoints / "checkpoint-1", source)
    change_tensors(source / checkpoint.MODEL, lambda tensors: tensors[trainable(source)].add_(1))
    job = make_job(manifest, tmp_path / "run", max_steps=1, init={"weights": str(source)})
    with pytest.raises(UserError, match=r"checkpoint-1/model\.safetensors: is not as it was written"):
        train(job, world)
