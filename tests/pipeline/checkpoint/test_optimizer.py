"""The optimizer's state: the same at any world size and ZeRO stage."""

import os
import shutil
from pathlib import Path

import pytest

from pipeline import checkpoint
from pipeline.distributed import World
from pipeline.errors import UserError
from tests.pipeline.checkpoint.engines import STEPS, assert_close, go_on, make_engine, make_state, save_after_steps
from tests.ranks import Ranks


@pytest.fixture(scope="module")
def later(world: World, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two more steps in the engine of one rank at stage 0."""
    folder = tmp_path_factory.mktemp("later")
    go_on(world, 0, saved, folder)
    return folder / "later" / f"checkpoint-{STEPS + 2}"


@pytest.mark.parametrize("stage", [0, 1])
def test_stages_and_world_sizes_write_the_same(
    world: World, ranks: Ranks, saved: Path, stage: int, tmp_path: Path
) -> None:
    assert_close(save_after_steps(world, stage, tmp_path / "one"), saved, 1e-6)
    assert_close(ranks.run(save_after_steps, stage, tmp_path / "two")[0], saved, 1e-6)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("size", [1, 2], ids=["1 rank", "2 ranks"])
def test_it_loads_at_any_world_size_and_stage(
    world: World, ranks: Ranks, saved: Path, later: Path, size: int, stage: int, tmp_path: Path
) -> None:
    again = go_on(world, stage, saved, tmp_path) if size == 1 else ranks.run(go_on, stage, saved, tmp_path)[0]
    assert_close(again, saved, 0)
    assert_close(tmp_path / "later" / f"checkpoint-{STEPS + 2}", later, 1e-6)


def test_other_group_settings_are_found(world: World, saved: Path) -> None:
    engine = make_engine(world, 0, saved)
    groups = tuple({**group, "weight_decay": 0.0} for group in checkpoint.group_settings(engine.basic_optimizer))
    with pytest.raises(AssertionError, match="other parameter groups"):
        checkpoint.restore_optimizer(engine, world, saved, make_state(STEPS, groups=groups))


def test_weights_that_are_not_the_saved_ones_are_found(world: World, saved: Path) -> None:
    engine = make_engine(world, 1)
    with pytest.raises(AssertionError, match="is not the saved one"):
        checkpoint.restore_optimizer(engine, world, saved, make_state(STEPS, engine))


def test_a_damaged_file_is_refused_by_name(world: World, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    os.truncate(tmp_path / checkpoint.OPTIMIZER, (saved / checkpoint.OPTIMIZER).stat().st_size - 7)
    with pytest.raises(UserError, match=rf"{checkpoint.OPTIMIZER}: cannot be read"):
        make_engine(world, 0, tmp_path)
