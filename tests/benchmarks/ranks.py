"""What a rank's host does for a step beside the network, at numbers of ranks that no machine here has.

    python tests/benchmarks/ranks.py

The ranks are torch's fake process group, whose collectives return at once: what is timed is the loop's own work of rank
0 for a step of two images a rank, with a network of one weight: planning the global batch, the sums over the ranks and
what they decide, the learning rates, a point of the curves. The look at all ranks' heartbeats, which comes every ten
seconds and in a thread, is timed for itself.
"""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from scale import make
from torch.testing._internal.distributed.fake_pg import FakeStore

from model.config import DetrConfig
from pipeline.checkpoint.save import CheckpointWriter
from pipeline.config.sections import TrainSection
from pipeline.data.loader import Step
from pipeline.data.manifest import read_manifest
from pipeline.data.order import SampleOrder
from pipeline.data.samples import plan_step
from pipeline.distributed import World, begin_sum_over_ranks
from pipeline.run_folder import RunFolder
from pipeline.train.curves import Curves
from pipeline.train.loop import _agree, _begin_to_share
from pipeline.train.optim import set_learning_rates
from pipeline.train.run import Run, TrainJob
from pipeline.train.watch import Beat, Peers

IMAGES = 118_000
STEPS = 40
MOST_MILLISECONDS = 5.0
LOSSES = 22
"""Names of losses of a step: class, L1 and GIoU of six layers, cardinality and class errors."""


def milliseconds_a_step(folder: Path, ranks: int) -> dict[str, float]:
    """The median time of each part of a step, and of a look at the heartbeats."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)  # type: ignore[no-untyped-call]
    world = World(rank=0, size=ranks, local_rank=0, device=torch.device("cpu"))
    train = TrainSection(global_batch=2 * ranks, micro_batch=2, log_steps=1)
    job = TrainJob(DetrConfig(num_classes=1), train, folder, RunFolder(folder / f"run-{ranks}"))
    run = Run(job, world, read_manifest(folder))
    order = SampleOrder(run.manifest.digest, run.manifest.shard_sizes, train.seed, train.window)
    optimizer = torch.optim.AdamW(
        [{"params": [torch.zeros(1)], "name": name, "base_lr": 1e-4} for name in ("base", "backbone", "projections")]
    )
    curves = Curves(job.out.train_spool, train, run.total, run.epochs, 0)
    writer = CheckpointWriter(world, job.out.checkpoints, None)
    times: dict[str, list[float]] = {name: [] for name in ("plan", "agree", "write")}
    for number in range(STEPS):
        begin = time.perf_counter()
        plan_step(run.manifest, order, number, train)
        planned = time.perf_counter()
        begin_sum_over_ranks(world, torch.tensor([7.0, 0, 0], dtype=torch.float64))()
        set_learning_rates(optimizer, run.factor(number))
        losses = {
            "loss" if index == 0 else f"loss_{index}": torch.tensor(0.5, dtype=torch.float64) for index in range(LOSSES)
        }
        shared = _begin_to_share(losses, run, False, None)
        values, _ = _agree(losses, shared, torch.tensor(1.0), Step(number, 0, []), run, None, writer)
        agreed = time.perf_counter()
        curves.step_done(number, values, optimizer)
        done = time.perf_counter()
        for name, seconds in zip(times, (planned - begin, agreed - planned, done - agreed), strict=True):
            times[name].append(1000 * seconds)
    peers, looks = Peers(60, 1200), []
    beats = {rank: Beat(f"host-{rank // 8}", 1, 0, 0.0) for rank in range(ranks)}
    for number in range(STEPS):
        beats = {rank: replace(beat, number=number, steps=number, seconds=9.0 * number) for rank, beat in beats.items()}
        begin = time.perf_counter()
        assert peers.verdict(beats) is None
        assert not peers.slow()
        looks.append(1000 * (time.perf_counter() - begin))
    curves.close()
    writer.close()
    dist.destroy_process_group()
    return {name: statistics.median(values) for name, values in {**times, "heartbeats": looks}.items()}


def main() -> None:
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), IMAGES)
        for ranks in (8, 64, 512, 1024):
            parts = milliseconds_a_step(Path(folder), ranks)
            heartbeats = parts.pop("heartbeats")
            told = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
            print(
                f"{ranks:>5} ranks, {2 * ranks} images: {sum(parts.values()):.2f} ms a step ({told}); a look at all "
                f"heartbeats {heartbeats:.2f} ms"
            )
            failed |= sum(parts.values()) > MOST_MILLISECONDS
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
