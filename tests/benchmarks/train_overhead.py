"""Training by two workers, against two bare processes side by side, in the same run: the demo, or another recipe.

    python tests/benchmarks/train_overhead.py
    python tests/benchmarks/train_overhead.py --config jobs/configs/coco_r50.yaml --size 480 --batch 2 --steps 6

The bare ones have their batches in memory and run forward, losses, backward, clipping and AdamW of the same steps; no
loader, no DeepSpeed, nothing that one tells the other. Both take turns. Images are drawn, a micro-batch a worker.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from model import build_model
from model.losses.criterion import Criterion
from model.losses.groups import groups_of
from pipeline.config.load import load_config
from pipeline.data.loader import TrainLoader
from pipeline.data.manifest import read_manifest
from pipeline.data.order import SampleOrder
from pipeline.distributed import World, gather_objects, init_world
from pipeline.run_folder import RunFolder
from pipeline.shard.coco import open_split
from pipeline.shard.synthetic import draw_configured
from pipeline.shard.write import shard_split
from pipeline.train.loop import train
from pipeline.train.optim import make_optimizer, parameter_groups
from pipeline.train.run import TrainJob

LEAST = 0.8
POINTS = 6
"""Points of the curves, after equally many steps each; what is before the first is left out."""


def ours(world: World, job: TrainJob) -> float:
    """Steps per second of the pipeline, by its own curves."""
    train(job, world)
    points = [json.loads(line)["metrics"] for line in job.out.train_spool.read_text().splitlines()]
    return statistics.median(p["train/images_per_second"] for p in points[2:]) / job.train.global_batch


def bare(world: World, job: TrainJob) -> float:
    """Steps per second of this process alone, while the other does the same."""
    settings, manifest = job.train, read_manifest(job.shards, job.cache)
    order = SampleOrder(manifest.digest, manifest.shard_sizes, settings.seed, settings.window)
    steps = list(TrainLoader(manifest, order, settings, world.rank, world.size, 0, settings.max_steps))
    torch.manual_seed(settings.seed)
    model = build_model(job.model).train()
    model.backbone.freeze(settings.freeze_backbone)
    optimizer, criterion = make_optimizer(parameter_groups(model, settings)), Criterion(settings.criterion, "focal")
    times: list[float] = []
    torch.distributed.barrier()
    for step in steps:
        begin = time.perf_counter()
        for micro in step.micro_batches:
            losses = criterion(groups_of(model(micro.batch.to("cpu")), micro.targets), 20.0, settings.global_batch)
            losses.total().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begin)
    return len(times[settings.log_steps :]) / sum(times[settings.log_steps :])


def worker(rank: int, folder: Path, repeats: int, job: TrainJob) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    world = init_world("cpu")
    ratios = []
    for repeat in range(repeats):
        own = ours(world, replace(job, out=RunFolder(folder / f"run{repeat}"))), bare(world, job)
        trained, alone = (statistics.mean(speeds) for speeds in zip(*gather_objects(world, own), strict=True))
        ratios.append(trained / alone)
        if rank == 0:
            print(f"{trained:.2f} steps/s by two workers, {alone:.2f} by two bare processes: {ratios[-1]:.2f}")
    if rank == 0:
        print(f"median {statistics.median(ratios):.2f} of the bare speed")
        if statistics.median(ratios) < LEAST:
            raise SystemExit(f"less than {LEAST}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="jobs/configs/demo.yaml", help="whose network and settings are trained")
    parser.add_argument("--size", type=int, default=128, help="side of the images, in pixels")
    parser.add_argument("--batch", type=int, default=8, help="images of a step")
    parser.add_argument("--steps", type=int, default=60, help="steps of a run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of both")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = options.size
        settings = [f"runs={folder}", f"dataset.root={folder}/data", "dataset.labels=contiguous",
                    "dataset.synthetic.train_images=400", "dataset.synthetic.val_images=8",
                    f"dataset.synthetic.image_size={size}", f"train.augment.short_sides=[{size}]",
                    f"train.augment.max_side={size}", "train.augment.crop=0", "train.init.backbone=null",
                    f"train.global_batch={options.batch}", f"train.micro_batch={options.batch // 2}",
                    "train.loader_workers=0", "cluster.workers=2", f"train.max_steps={options.steps}",
                    f"train.log_steps={options.steps // POINTS}"]  # fmt: skip
        config = load_config(options.config, settings)
        draw_configured(config.dataset)
        source = open_split(config.dataset, config.dataset.train)
        manifest = shard_split(source, "train", config.shards_folder, config.dataset, config.shards)
        model = config.model_for(manifest.labels.num_classes)
        job = TrainJob(model, config.train, manifest.folder, config.folder)
        torch.multiprocessing.spawn(worker, (folder, options.repeats, job), nprocs=2)


if __name__ == "__main__":
    main()
