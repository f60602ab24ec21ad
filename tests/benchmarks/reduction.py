"""A step of two ranks whose gradients are reduced during the backward pass, against DeepSpeed's reduction after it.

    python tests/benchmarks/reduction.py
    python tests/benchmarks/reduction.py --config jobs/configs/coco_r50.yaml --size 480 --images 1 --steps 5

Each rank has an image or more of random pixels, and one thread; the two take turns, step by step.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from model import DetrConfig, ImageBatch, build_model
from model.losses.criterion import Criterion
from model.losses.groups import groups_of
from pipeline.config.load import load_config
from pipeline.config.sections import TrainSection
from pipeline.distributed import gather_objects, init_world
from pipeline.train.engine import engine_config, import_deepspeed, take_step
from pipeline.train.optim import make_optimizer, parameter_groups
from pipeline.train.reduce import reduce_early

OBJECTS = 7
"""Of an image."""


class Timed:
    """An engine that notes how long it reduces when a backward pass has ended."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.reduce = engine, engine.buffered_allreduce_fallback
        engine.buffered_allreduce_fallback = self._reduce
        self.rest = 0.0

    def _reduce(self, **settings: Any) -> None:
        begin = time.perf_counter()
        self.reduce(**settings)
        self.rest = time.perf_counter() - begin


def worker(rank: int, folder: Path, architecture: DetrConfig, train: TrainSection, size: int, steps: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    world = init_world("cpu")
    deepspeed = import_deepspeed(world)
    engines = []
    for early in (False, True):
        torch.manual_seed(0)
        model = build_model(architecture).train()
        model.backbone.freeze(train.freeze_backbone)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=make_optimizer(parameter_groups(model, train)), config=engine_config(train, 2),
            dist_init_required=False,
        )  # fmt: skip
        if early:
            reduce_early(engine, world)
        engines.append(Timed(engine))
    criterion = Criterion(train.criterion, architecture.class_loss)
    torch.manual_seed(rank)
    images = train.micro_batch
    batch = ImageBatch(torch.randn(images, 3, size, size), torch.zeros(images, size, size, dtype=torch.bool))
    targets = [
        {"labels": torch.zeros(OBJECTS, dtype=torch.int64), "boxes": 0.25 + 0.5 * torch.rand(OBJECTS, 4)}
    ] * images
    times: list[list[tuple[float, float]]] = [[], []]
    for _ in range(steps + 1):
        for timed, own in zip(engines, times, strict=True):
            torch.distributed.barrier()
            begin = time.perf_counter()
            groups = groups_of(timed.engine(batch), targets)
            timed.engine.backward(criterion(groups, 2.0 * OBJECTS * images, train.global_batch).total())
            take_step(timed.engine, train.clip_grad_norm)
            own.append((time.perf_counter() - begin, timed.rest))
    for name, own in zip(("after the backward pass", "during it"), times, strict=True):
        ranks = gather_objects(world, own[1:])
        step = statistics.median(seconds for own in ranks for seconds, _ in own)
        # The rank that is done first waits for the other, too.
        rest = statistics.median(min(rest for _, rest in pair) for pair in zip(*ranks, strict=True))
        if rank == 0:
            print(f"reduced {name}: a step {1e3 * step:.0f} ms, of which {1e3 * rest:.1f} ms after the backward pass")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="jobs/configs/demo.yaml", help="whose network and settings are trained")
    parser.add_argument("--size", type=int, default=128, help="side of the images, in pixels")
    parser.add_argument("--images", type=int, default=4, help="images of a rank in a step")
    parser.add_argument("--steps", type=int, default=40, help="steps of each")
    options = parser.parse_args()
    settings = [f"train.global_batch={2 * options.images}", f"train.micro_batch={options.images}", "cluster.workers=2"]
    config = load_config(options.config, settings)
    with tempfile.TemporaryDirectory() as name:
        arguments = (Path(name), config.model_for(91), config.train, options.size, options.steps)
        torch.multiprocessing.spawn(worker, arguments, nprocs=2)


if __name__ == "__main__":
    main()
