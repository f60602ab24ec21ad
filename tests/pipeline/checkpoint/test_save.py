"""Checkpoints: whole or not there."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline import checkpoint
from pipeline.distributed import World
from pipeline.errors import UserError
from tests.builders import disk_of
from tests.pipeline.checkpoint.engines import STEPS, Net, make_engine, make_folder, make_state, step, tensors


def test_a_checkpoint_holds_everything_by_name(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == sorted(
        [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE]
    )
    weights, moments = load_file(saved / checkpoint.MODEL), load_file(saved / checkpoint.OPTIMIZER)
    assert weights.keys() == Net().state_dict().keys()
    assert torch.equal(weights["again.weight"], weights["head.weight"])
    assert torch.equal(weights["frozen"], torch.full((2,), 7.0))
    trainable = [name for name, parameter in Net().named_parameters() if parameter.requires_grad]
    assert moments.keys() == {f"{name}/{key}" for name in trainable for key in ("exp_avg", "exp_avg_sq", "step")}
    assert all(moments[f"{name}/exp_avg"].shape == weights[name].shape for name in trainable)
    assert all(moments[f"{name}/step"] == STEPS for name in trainable)


def test_cleaning_removes_what_was_never_finished(tmp_path: Path) -> None:
    kept = [make_folder(tmp_path, "checkpoint-9"), make_folder(tmp_path, "checkpoint-best", state=False)]
    make_folder(tmp_path, "checkpoint-11", state=False)
    make_folder(tmp_path, "checkpoint-12.tmp")
    checkpoint.clean(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize(("keep", "kept"), [(1, [4]), (2, [3, 4]), (None, [1, 2, 3, 4])], ids=["1", "2", "all"])
def test_the_newest_are_kept(world: World, tmp_path: Path, keep: int | None, kept: list[int]) -> None:
    engine = make_engine(world, 0)
    step(engine, world, 0)
    for number in range(1, 5):
        checkpoint.save(engine, world, tmp_path, make_state(number, engine), keep)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [f"checkpoint-{number}" for number in kept]
    assert len(list(tmp_path.iterdir())) == len(kept)


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER])
def test_a_full_disk_leaves_the_checkpoint_before(world: World, tmp_path: Path, name: str) -> None:
    engine = make_engine(world, 0)
    step(engine, world, 0)
    before = checkpoint.save(engine, world, tmp_path, make_state(1, engine), 1)
    content = tensors(before)
    size = (before / name).stat().st_size - 1
    with (
        disk_of(size),
        pytest.raises(UserError, match=r"checkpoint-2: cannot be written .*Make room; checkpoint-1 is"),
    ):
        checkpoint.save(engine, world, tmp_path, make_state(2, engine), 1)
    assert list(tmp_path.iterdir()) == [before]
    assert all(torch.equal(tensor, content[name]) for name, tensor in tensors(before).items())
