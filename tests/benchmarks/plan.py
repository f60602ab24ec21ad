"""Times that a plan predicts from a profile, against those measured of what it was not made of, on a CPU.

    python tests/benchmarks/plan.py

A profile of one network at two sizes of images, and micro-batches of other numbers and sizes; then whole steps of
training the demo, with their loading in other processes. Seconds are those of this process on the processor, with one
thread.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from jobs.plan import make_plan
from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.data.manifest import Manifest
from pipeline.distributed import init_world
from pipeline.plan.profile import Profile, measure_profile
from pipeline.plan.table import profile_canvases
from pipeline.run_folder import RunFolder
from pipeline.shard.coco import open_split
from pipeline.shard.synthetic import draw_configured
from pipeline.shard.write import shard_split
from pipeline.train.loop import train
from pipeline.train.run import TrainJob

MOST = 0.2
STEPS = 20
TURNS = 3
DEVICE = torch.device("cpu")


def configured(name: str, *settings: str) -> Config:
    return load_config(f"jobs/configs/{name}.yaml", ["cluster.workers=1", *settings])


def measured(config: Config, canvases: Sequence[tuple[int, int]]) -> Profile:
    model = config.model_for(91 if config.dataset.labels == "coco91" else 6)
    job = TrainJob(model, config.train, config.shards_folder / "train", config.folder)
    return measure_profile(job, canvases, DEVICE, time.process_time)


def error(what: str, predicted: float, real: float) -> float:
    print(f"{what}: {real:.3f} s, predicted {predicted:.3f}: {100 * (predicted / real - 1):+.1f} %", flush=True)
    return abs(predicted / real - 1)


def micro_batches(
    name: str, fitted: int, canvases: Sequence[tuple[int, int]], others: Sequence[tuple[int, int, int]]
) -> Iterator[float]:
    """Errors at others (images, height, width) of a profile of so many images on these canvases."""
    profile = measured(configured(name, f"train.micro_batch={fitted}"), canvases)
    for images, height, width in others:
        own = measured(configured(name, f"train.micro_batch={images}"), [(height, width)]).points[0]
        yield error(f"{name}, {images} x {height} x {width}", profile.seconds(own.flops), own.seconds)


def steps(folder: Path) -> list[float]:
    """Errors of whole steps of the demo, at other batches and sizes than those of its profile."""
    own = [f"runs={folder}", f"dataset.root={folder}/data", "dataset.synthetic.train_images=400",
           "dataset.synthetic.val_images=4", "train.loader_workers=1"]  # fmt: skip
    config = configured("demo", *own)
    draw_configured(config.dataset)
    source = open_split(config.dataset, config.dataset.train)
    manifest = shard_split(source, "train", config.shards_folder, config.dataset, config.shards)
    seconds_of_step(folder / "warm", config, manifest)
    errors = []
    for number, settings in enumerate(
        (
            ["train.micro_batch=8"],
            ["train.micro_batch=2"],
            ["train.augment={short_sides: [192], max_side: 192, crop: 0}"],
        )
    ):
        other = configured("demo", *own, *settings)
        pairs = []
        for turn in range(TURNS):
            profile = measured(config, profile_canvases(make_plan(config)))
            predicted = replace(make_plan(other), profile=profile, card=None).row(1, 1).step
            pairs.append((predicted, seconds_of_step(folder / f"run{number}-{turn}", other, manifest)))
        predicted, real = map(statistics.median, zip(*pairs, strict=True))
        errors.append(error(f"demo, steps with {settings[0]}", predicted, real))
    return errors


def seconds_of_step(out: Path, config: Config, manifest: Manifest) -> float:
    def until(step: int) -> float:
        settings = config.train.model_copy(update={"max_steps": step})
        job = TrainJob(config.model_for(6), settings, manifest.folder, RunFolder(out / f"{step}"))
        begin = time.process_time()
        train(job, init_world("cpu"))
        return time.process_time() - begin

    few = until(2)
    return (until(2 + STEPS) - few) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    errors = [
        *micro_batches("demo", 4, [(64, 64), (128, 128)], [(8, 128, 128), (4, 192, 192), (2, 160, 96)]),
        *micro_batches("coco_r50", 1, [(128, 160), (256, 320)], [(2, 256, 256), (1, 416, 512), (4, 128, 192)]),
    ]
    with tempfile.TemporaryDirectory() as name:
        errors += steps(Path(name))
    print(f"greatest error {100 * max(errors):.1f} %, at most {100 * MOST:.0f}")
    if max(errors) > MOST:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
