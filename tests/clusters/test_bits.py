"""A run of two ranks that is killed ends with the bits of one that is not: at every ZeRO stage and precision."""

import itertools
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from pipeline.checkpoint.state import EMA, read_state
from pipeline.distributed import close, init_world
from pipeline.train.loop import train
from pipeline.train.run import TrainJob
from tests.builders import make_varied_manifest
from tests.pipeline.train.runs import SAMPLES, assert_same_weights, losses, make_job, train_on
from tests.ranks import Ranks, processes

SECONDS = 120


def train_rank(rank: int, store: Path, job: TrainJob) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    world = init_world("cpu")
    train(job, world)
    close(world)


def begin(store: Path, job: TrainJob) -> list[Any]:
    """Two processes that train."""
    both = [processes().Process(target=train_rank, args=(rank, store, job), daemon=True) for rank in range(2)]
    for process in both:
        process.start()
    return both


@pytest.mark.parametrize(
    ("stage", "precision"), list(itertools.product((0, 1, 2, 3), ("fp32", "bf16", "fp16"))), ids=str
)
def test_a_killed_run_ends_with_the_same_bits(ranks: Ranks, tmp_path: Path, stage: int, precision: str) -> None:
    manifest = make_varied_manifest(tmp_path / "data", SAMPLES, max_samples=6)
    settings = {"zero_stage": stage, "precision": precision, "ema": 0.9}
    straight, job = (make_job(manifest, tmp_path / name, **settings) for name in ("straight", "killed"))
    ranks.run(train_on, straight)

    points = random.randint(4, 6)  # in the middle of the second epoch or of the third
    both = begin(tmp_path / "first", job)
    deadline = time.monotonic() + SECONDS
    while not (job.out.train_spool.exists() and len(job.out.train_spool.read_text().splitlines()) >= points):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for process in random.sample(both, 2):
        process.kill()
        process.join()
    assert len(losses(job.out)) < 8, "it was not killed in time"

    again = begin(tmp_path / "second", job)
    for process in again:
        process.join(SECONDS)
    assert [process.exitcode for process in again] == [0, 0]
    ours, theirs = (run.out.checkpoints / "checkpoint-8" for run in (job, straight))
    assert_same_weights(ours, theirs)
    averages = load_file(theirs / EMA)
    assert all(torch.equal(tensor, averages[name]) for name, tensor in load_file(ours / EMA).items())
    assert read_state(ours).scaling == read_state(theirs).scaling
    assert losses(job.out) == losses(straight.out)
