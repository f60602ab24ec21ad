"""Checkpoints: whole or not there."""

import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline import checkpoint
from pipeline.checkpoint import save as save_module
from pipeline.checkpoint.state import State
from pipeline.checkpoint.weights import on_host
from pipeline.distributed import World
from pipeline.errors import UserError
from tests.builders import disk_of
from tests.pipeline.checkpoint.engines import STEPS, Net, make_engine, make_folder, make_state, save, step, tensors


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


def test_cleaning_removes_what_was_never_finished_and_sets_aside_what_lost_its_state(tmp_path: Path) -> None:
    kept = [make_folder(tmp_path, "checkpoint-9"), make_folder(tmp_path, "checkpoint-best", state=False)]
    make_folder(tmp_path, "checkpoint-11", state=False)
    make_folder(tmp_path, "checkpoint-12.tmp")
    checkpoint.clean(tmp_path)
    aside = tmp_path / "checkpoint-11.damaged"
    assert sorted(tmp_path.iterdir()) == sorted([*kept, aside])
    assert (aside / checkpoint.MODEL).read_bytes() == b"weights"
    checkpoint.clean(tmp_path)
    assert aside.is_dir()


@pytest.mark.parametrize(("keep", "kept"), [(1, [4]), (2, [3, 4]), (None, [1, 2, 3, 4])], ids=["1", "2", "all"])
def test_the_newest_are_kept(world: World, tmp_path: Path, keep: int | None, kept: list[int]) -> None:
    engine = make_engine(world, 0)
    step(engine, world, 0)
    for number in range(1, 5):
        save(engine, world, tmp_path, make_state(number, engine), keep)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [f"checkpoint-{number}" for number in kept]
    assert len(list(tmp_path.iterdir())) == len(kept)


def test_the_best_is_kept_beside_the_newest(world: World, tmp_path: Path) -> None:
    engine = make_engine(world, 0)
    step(engine, world, 0)
    with closing(checkpoint.CheckpointWriter(world, tmp_path, 1, lambda: "checkpoint-2")) as writer:
        for number in range(1, 5):
            writer.begin(engine, make_state(number, engine))
        writer.finish()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER])
def test_a_full_disk_leaves_the_checkpoint_before(world: World, tmp_path: Path, name: str) -> None:
    engine = make_engine(world, 0)
    step(engine, world, 0)
    before = save(engine, world, tmp_path, make_state(1, engine), 1)
    content = tensors(before)
    size = (before / name).stat().st_size - 1
    with (
        disk_of(size),
        pytest.raises(UserError, match=r"checkpoint-2: cannot be written .*Make room; checkpoint-1 is"),
    ):
        save(engine, world, tmp_path, make_state(2, engine), 1)
    assert list(tmp_path.iterdir()) == [before]
    assert all(torch.equal(tensor, content[name]) for name, tensor in tensors(before).items())


def test_the_weights_may_change_once_they_are_copied(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step waits for the copy, though not for the disk, and the checkpoint is that of its own step."""
    engine = make_engine(world, 0)
    step(engine, world, 0)
    at_once = save(engine, world, tmp_path / "at-once", make_state(1, engine), None)
    may_copy, may_write, write = threading.Event(), threading.Event(), save_module._write

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        assert may_copy.wait(60)
        return on_host(tensor)

    def written(folder: Path, files: dict[str, dict[str, torch.Tensor]], state: State) -> Path:
        assert may_write.wait(60)
        return write(folder, files, state)

    monkeypatch.setattr(save_module, "on_host", copied)
    monkeypatch.setattr(save_module, "_write", written)
    writer = checkpoint.CheckpointWriter(world, tmp_path / "beside", None)
    path = writer.begin(engine, make_state(1, engine))
    threading.Timer(0.2, may_copy.set).start()
    writer.wait_copied()
    assert may_copy.is_set()
    step(engine, world, 1)
    assert not path.exists()
    may_write.set()
    writer.finish()
    writer.close()
    left, right = tensors(at_once), tensors(path)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_what_fails_beside_training_is_raised_at_the_next_checkpoint(world: World, tmp_path: Path) -> None:
    engine = make_engine(world, 0)
    step(engine, world, 0)
    writer = checkpoint.CheckpointWriter(world, tmp_path / "checkpoints", None)
    (tmp_path / "checkpoints").write_text("a file in the folder's place")
    writer.begin(engine, make_state(1, engine))
    with pytest.raises(UserError, match="checkpoint-1: cannot be written"):
        writer.begin(engine, make_state(2, engine))
    assert writer.error is not None
    writer.close()


def test_the_points_before_a_checkpoint_are_as_durable_as_it_is(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(world, 0)
    step(engine, world, 0)
    synced: list[str] = []
    monkeypatch.setattr(save_module, "sync", lambda path: synced.append(path.name))
    spool = tmp_path / "train.jsonl"
    spool.write_text("{}\n")
    writer = checkpoint.CheckpointWriter(world, tmp_path / "checkpoints", None, spool=spool)
    writer.begin(engine, make_state(1, engine))
    writer.finish()
    writer.close()
    assert synced[0] == spool.name
    assert checkpoint.MODEL in synced
