"""Checkpoints: whole or not there, at any world size and ZeRO stage."""

import dataclasses
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from model import DetrConfig
from pipeline import checkpoint
from pipeline.checkpoint.state import State
from pipeline.config.sections import TrainSection
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.train.engine import engine_config, import_deepspeed
from pipeline.train.optim import make_optimizer, parameter_groups, set_learning_rates
from tests.ranks import Ranks

STEPS = 3


class Net(nn.Module):
    """Groups of odd sizes, a frozen parameter, a buffer and a shared weight."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, 5)
        self.reference_points = nn.Linear(5, 3)
        self.head = nn.Linear(3, 3)
        self.again = self.head
        self.frozen = nn.Parameter(torch.full((2,), 7.0), requires_grad=False)
        self.register_buffer("statistics", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, 3] -> [batch, 3]
        return self.again(self.head(self.reference_points(self.backbone(x)))) + self.statistics


def make_engine(world: World, stage: int, path: Path | None = None) -> Any:
    train = TrainSection(global_batch=2, micro_batch=1, zero_stage=stage, lr=1e-2, lr_backbone=1e-3, clip_grad_norm=0.5)
    deepspeed = import_deepspeed(world)
    torch.manual_seed(0)
    model = Net()
    if path is not None:
        model.load_state_dict(checkpoint.load_model_weights(path))
    optimizer = make_optimizer(parameter_groups(model, train))
    config = engine_config(train, world.size)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
    set_learning_rates(engine.basic_optimizer, 0.5)
    if path is not None:
        checkpoint.restore_optimizer(engine, world, path, checkpoint.read_state(path))
    return engine


def step(engine: Any, world: World, number: int) -> None:
    """The same step at any number of ranks: two micro-batches of one sample."""
    for j in range(world.rank, 2, world.size):
        torch.manual_seed(10 * number + j)
        engine.set_gradient_accumulation_boundary(j + world.size >= 2)
        engine.backward(engine(torch.randn(1, 3)).square().sum())
    engine.step()


def make_state(step: int, engine: Any = None, **changes: Any) -> State:
    state = State(
        step=step, epoch=0, samples=2 * step, skipped=0, seeds={"train": 0}, world_size=1, zero_stage=0,
        config={"model": {"num_classes": 4}, "train": {"lr": 1e-2}}, data_digest="d",
        labels={"kind": "contiguous", "categories": []},
        groups=() if engine is None else checkpoint.group_settings(engine.basic_optimizer),
    )  # fmt: skip
    return dataclasses.replace(state, **changes)


def save_after_steps(world: World, stage: int, folder: Path) -> Path:
    engine = make_engine(world, stage)
    for number in range(STEPS):
        step(engine, world, number)
    return checkpoint.save(engine, world, folder, make_state(STEPS, engine), None)


def go_on(world: World, stage: int, path: Path, folder: Path) -> Path:
    """Restore, write what was restored, and what two more steps make of it."""
    engine = make_engine(world, stage, path)
    again = checkpoint.save(engine, world, folder / "again", make_state(STEPS, engine), None)
    for number in (STEPS, STEPS + 1):
        step(engine, world, number)
    checkpoint.save(engine, world, folder / "later", make_state(STEPS + 2, engine), None)
    return again


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / checkpoint.MODEL) | load_file(path / checkpoint.OPTIMIZER)


def assert_close(left: Path, right: Path, tolerance: float) -> None:
    ours, theirs = tensors(left), tensors(right)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def saved(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_after_steps(world, 0, tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def later(world: World, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two more steps in the engine of one rank at stage 0."""
    folder = tmp_path_factory.mktemp("later")
    go_on(world, 0, saved, folder)
    return folder / "later" / f"checkpoint-{STEPS + 2}"


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
    with pytest.raises(UserError, match=r"state\.json: other .* groups .*groups\.0\.weight_decay: 0\.0 -> 0\.0001"):
        checkpoint.restore_optimizer(engine, world, saved, make_state(STEPS, groups=groups))


def test_weights_that_are_not_the_saved_ones_are_found(world: World, saved: Path) -> None:
    engine = make_engine(world, 1)
    with pytest.raises(UserError, match=r"model\.safetensors: .* is not the saved one"):
        checkpoint.restore_optimizer(engine, world, saved, make_state(STEPS, engine))


def make_folder(folder: Path, name: str, *, state: bool = True) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / checkpoint.MODEL).write_bytes(b"weights")
    if state:
        (path / checkpoint.STATE).write_text("{}")
    return path


def test_the_latest_is_the_whole_one_with_most_steps(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "missing") is None
    make_folder(tmp_path, "checkpoint-9")
    newest = make_folder(tmp_path, "checkpoint-10")
    make_folder(tmp_path, "checkpoint-11", state=False)
    make_folder(tmp_path, "checkpoint-12.tmp")
    make_folder(tmp_path, "checkpoint-best")
    assert checkpoint.latest(tmp_path) == newest


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
        checkpoint.save(engine, world, tmp_path, make_state(number, engine), keep)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [f"checkpoint-{number}" for number in kept]
    assert len(list(tmp_path.iterdir())) == len(kept)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process may become larger: what a full disk looks like to the writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER])
def test_a_full_disk_leaves_the_checkpoint_before(world: World, tmp_path: Path, name: str) -> None:
    engine = make_engine(world, 0)
    step(engine, world, 0)
    before = checkpoint.save(engine, world, tmp_path, make_state(1, engine), 1)
    content = tensors(before)
    size = (before / name).stat().st_size - 1
    with (
        full_disk(size),
        pytest.raises(UserError, match=r"checkpoint-2: cannot be written .*Make room; checkpoint-1 is"),
    ):
        checkpoint.save(engine, world, tmp_path, make_state(2, engine), 1)
    assert list(tmp_path.iterdir()) == [before]
    assert all(torch.equal(tensor, content[name]) for name, tensor in tensors(before).items())


def test_state_comes_back_as_it_was(saved: Path) -> None:
    state = checkpoint.read_state(saved)
    assert state == make_state(STEPS, groups=state.groups, files=state.files)
    assert [group["name"] for group in state.groups] == ["main", "sampling", "backbone"]
    assert state.groups[0]["lr"] == 0.5 * 1e-2
    assert dataclasses.replace(state, config={"model": {"num_classes": 4}}).detr_config() == DetrConfig(num_classes=4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "not of format"),
        (json.dumps({"format": 99}), "not of format"),
        (json.dumps({"format": 1, "step": 3}), "lacks config, data_digest"),
    ],
    ids=["missing", "torn", "list", "newer", "incomplete"],
)
def test_a_state_that_is_none_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / checkpoint.STATE).write_text(content)
    with pytest.raises(UserError, match=message):
        checkpoint.read_state(tmp_path)


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER])
def test_damaged_tensors_are_refused_by_name(world: World, saved: Path, tmp_path: Path, name: str) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes((saved / name).read_bytes()[:-7])
    with pytest.raises(UserError, match=rf"{name}: cannot be read"):
        make_engine(world, 0, tmp_path)
