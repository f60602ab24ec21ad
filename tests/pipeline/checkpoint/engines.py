"""Small engines, and checkpoints of them."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from pipeline import checkpoint
from pipeline.checkpoint.state import Scaling, State
from pipeline.config.sections import TrainSection
from pipeline.distributed import World
from pipeline.train.engine import engine_config, import_deepspeed, take_step
from pipeline.train.loss_scale import install, loss_scale_of
from pipeline.train.optim import make_optimizer, parameter_groups, set_learning_rates

STEPS = 3
CLIP = 0.5
CUT: dict[str, Any] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Stage 3 cuts the smallest parameters, too."""


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


def make_engine(
    world: World, stage: int, path: Path | None = None, scaling: Scaling | None = None, **settings: Any
) -> Any:
    """In fp32, or in fp16 with a scale of the loss."""
    train = TrainSection(
        global_batch=2, micro_batch=1, zero_stage=stage, lr=1e-2, lr_backbone=1e-3, clip_grad_norm=CLIP, deepspeed=CUT,
        precision="fp32" if scaling is None else "fp16", **settings,
    )  # fmt: skip
    deepspeed = import_deepspeed(world)
    torch.manual_seed(0)
    model = Net()
    if path is not None:
        model.load_state_dict(checkpoint.load_model_weights(path))
    optimizer = make_optimizer(parameter_groups(model, train))
    config = engine_config(train, world.size)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
    install(engine, scaling, world.size)
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
    norm, scale = take_step(engine, CLIP), loss_scale_of(engine)
    if scale is not None:
        scale.follow(number, float(norm))


def make_state(step: int, engine: Any = None, **changes: Any) -> State:
    state = State(
        step=step, epoch=0, samples=2 * step, skipped=0, seeds={"train": 0}, world_size=1, zero_stage=0,
        config={"model": {"num_classes": 4}, "train": {"lr": 1e-2}},
        labels={"kind": "contiguous", "categories": []}, data_digest="d",
        groups=() if engine is None else checkpoint.group_settings(engine.basic_optimizer),
    )  # fmt: skip
    return dataclasses.replace(state, **changes)


def save(engine: Any, world: World, folder: Path, state: State, keep: int | None) -> Path:
    """Write a checkpoint and wait for it."""
    writer = checkpoint.CheckpointWriter(world, folder, keep)
    try:
        path = writer.begin(engine, state)
        writer.finish()
    finally:
        writer.close()
    return path


def save_after_steps(world: World, stage: int, folder: Path) -> Path:
    engine = make_engine(world, stage)
    for number in range(STEPS):
        step(engine, world, number)
    return save(engine, world, folder, make_state(STEPS, engine), None)


def go_on(world: World, stage: int, path: Path, folder: Path, offload: str = "none") -> Path:
    """Restore, write what was restored, and what two more steps make of it."""
    engine = make_engine(world, stage, path, offload=offload)
    again = save(engine, world, folder / "again", make_state(STEPS, engine), None)
    for number in (STEPS, STEPS + 1):
        step(engine, world, number)
    save(engine, world, folder / "later", make_state(STEPS + 2, engine), None)
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


def make_folder(folder: Path, name: str, *, state: bool = True) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / checkpoint.MODEL).write_bytes(b"weights")
    if state:
        (path / checkpoint.STATE).write_text("{}")
    return path
