"""Gradients that are averaged while the backward pass still computes others."""

import itertools
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.config.sections import TrainSection
from pipeline.distributed import World, init_world
from pipeline.train.engine import engine_config, import_deepspeed
from pipeline.train.optim import make_optimizer, parameter_groups
from pipeline.train.reduce import buckets_of, reduce_early
from tests.ranks import Ranks, processes


class Net(nn.Module):
    """A chain of layers, of which one may be passed by and one always is, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.passed, self.unused, self.head = (nn.Linear(3, 3) for _ in range(4))
        self.frozen = nn.Parameter(torch.full((2,), 7.0), requires_grad=False)

    def forward(self, x: torch.Tensor, passes: bool) -> torch.Tensor:  # [batch, 3] -> [batch, 3]
        x = self.backbone(x).tanh()
        return self.head(x if passes else x + self.passed(x))


def make_engine(world: World, early: bool = True, **settings: Any) -> Any:
    """With gradients reduced early, or by DeepSpeed itself; four micro-batches a step."""
    train = TrainSection(global_batch=4, micro_batch=1, deepspeed=settings)
    deepspeed = import_deepspeed(world)
    torch.manual_seed(0)
    model = Net()
    engine = deepspeed.initialize(
        model=model, optimizer=make_optimizer(parameter_groups(model, train)), config=engine_config(train, world.size),
        dist_init_required=False,
    )[0]  # fmt: skip
    if early:
        reduce_early(engine, world)
    return engine


def backward(engine: Any, world: World, number: int, passes: bool = False) -> None:
    """That of micro-batch `number` of this rank's."""
    torch.manual_seed(10 * number + world.rank)
    engine.set_gradient_accumulation_boundary(number == 4 // world.size - 1)
    engine.backward(engine(torch.randn(1, 3), passes).square().sum())


def gradients(world: World, early: bool, passing: list[tuple[int, int]], settings: dict[str, Any]) -> list[Any]:
    """The gradients of each of two steps, of which the pairs (rank, micro-batch) in `passing` pass a layer by."""
    engine, steps = make_engine(world, early, **settings), []
    for _ in range(2):
        for number in range(4 // world.size):
            backward(engine, world, number, (world.rank, number) in passing)
        steps.append({name: parameter.grad for name, parameter in engine.module.named_parameters()})
        engine.step()
    return steps


def test_buckets_are_the_parameters_from_the_last_to_the_first() -> None:
    net = Net()
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    for number in (1, 2, 3, 100):
        buckets = buckets_of(net, number)
        assert [id(parameter) for parameter in itertools.chain(*buckets)] == [id(p) for p in trained[::-1]]
        assert len(buckets) == min(number, 8)
    assert [len(bucket) for bucket in buckets_of(net, 2)] == [4, 4]
    assert buckets_of(nn.Identity()) == buckets_of(net.requires_grad_(False)) == []


SETTINGS: list[dict[str, Any]] = [
    {},
    {"communication_data_type": "bf16"},
    {"prescale_gradients": True},
    {"gradient_predivide_factor": 4.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings), "as it is"))
@pytest.mark.parametrize(
    "passing",
    [[], [(1, 1)], [(1, 0), (1, 1)], list(itertools.product((0, 1), (0, 1)))],
    ids=["none", "in the last micro-batch", "one rank", "both"],
)
def test_they_are_the_bits_of_deepspeed(ranks: Ranks, passing: list[tuple[int, int]], settings: dict[str, Any]) -> None:
    """Whatever passes a layer by, on one rank or on both: what has no gradient has 0."""
    early, late = (ranks.run(gradients, early, passing, settings) for early in (True, False))
    for step in range(2):
        for name, gradient in late[0][step].items():
            for own in early:
                assert gradient is None if name == "frozen" else torch.equal(own[step][name], gradient), name
    assert not early[0][0]["unused.weight"].any()


def test_one_rank_has_the_bits_of_deepspeed(world: World) -> None:
    early, late = (gradients(world, early, [(0, 3)], {}) for early in (True, False))
    for ours, theirs in zip(early, late, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name != "frozen")


def order_of_events(world: World) -> list[str]:
    """What a step's backward passes do, by when it begins."""
    engine, events = make_engine(world), []
    for number in range(2):
        with torch.profiler.profile() as trace:
            backward(engine, world, number)
        began = sorted(trace.events(), key=lambda event: event.time_range.start)
        events.append(
            [event.name for event in began if event.name in ("torch::autograd::AccumulateGrad", "c10d::allreduce_")]
        )
    return events


def test_the_first_are_reduced_before_the_last_are_computed(ranks: Ranks) -> None:
    for accumulated, last in ranks.run(order_of_events):
        assert "c10d::allreduce_" not in accumulated
        assert last.index("c10d::allreduce_") < len(last) - 1 - last[::-1].index("torch::autograd::AccumulateGrad")


def wait_for_a_silent_rank(rank: int, store: Path, pipe: Any) -> None:
    limit = timedelta(seconds=10)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=limit)
    world = init_world("cpu")
    engine = make_engine(world)
    backward(engine, world, 0)
    if rank == 1:
        time.sleep(60)
    try:
        backward(engine, world, 1)
    except RuntimeError as error:
        pipe.send(f"{error}")


def test_a_rank_that_does_not_come_is_noticed(tmp_path: Path) -> None:
    ours, theirs = processes().Pipe()
    both = [processes().Process(target=wait_for_a_silent_rank, args=(rank, tmp_path / "store", theirs), daemon=True)
            for rank in range(2)]  # fmt: skip
    for process in both:
        process.start()
    try:
        assert ours.poll(50), "it waits longer than the process group's timeout"
        assert ours.recv()
    finally:
        for process in both:
            process.kill()
            process.join()
