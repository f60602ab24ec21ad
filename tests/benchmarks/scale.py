"""What a split of many images costs every process: opening its manifest, and planning a step.

    python tests/benchmarks/scale.py

The indexes are made up (rows of COCO's sizes, 1000 a shard); the shards are empty files.
"""

import multiprocessing
import pickle
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from pipeline.config.sections import TrainSection
from pipeline.data.index import INDEX_NAME, ROW
from pipeline.data.labels import Category, LabelMap
from pipeline.data.manifest import Manifest, Shard, read_manifest, write_manifest
from pipeline.data.order import SampleOrder
from pipeline.data.samples import plan_step

SAMPLES = 1000
SHAPES = np.array([(640, 480), (480, 640), (640, 427), (427, 640), (500, 375)])
MOST_SECONDS, MOST_PRIVATE, MOST_PLAN = 0.1, 40, 2.0


def make(folder: Path, images: int) -> None:
    rows = np.zeros(images, ROW)
    rows["image_id"] = np.arange(images)
    rows["width"], rows["height"] = SHAPES[np.random.default_rng(0).integers(0, len(SHAPES), images)].T
    rows["extension"] = b"jpg"
    np.save(folder / INDEX_NAME, rows)
    shards = [Shard(f"shard-{number:06d}.tar", SAMPLES, 0, "0" * 64) for number in range(images // SAMPLES)]
    for shard in shards:
        (folder / shard.name).touch()
    write_manifest(folder, "train", LabelMap("contiguous", (Category(1, "thing"),)), "0" * 64, {}, shards, {})


def milliseconds_a_plan(manifest: Manifest, global_batch: int) -> float:
    train = TrainSection(global_batch=global_batch, micro_batch=2)
    order = SampleOrder(manifest.digest, manifest.shard_sizes, train.seed, train.window)
    times = []
    for step in range(500, 540):
        begin = time.perf_counter()
        plan_step(manifest, order, step, train)
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def main() -> None:
    failed = False
    for images in (118_000, 1_000_000, 10_000_000):
        with tempfile.TemporaryDirectory() as folder:
            maker = multiprocessing.get_context("spawn").Process(target=make, args=(Path(folder), images))
            maker.start()
            maker.join()
            process = psutil.Process()
            before, begin = process.memory_full_info().uss, time.perf_counter()
            manifest = read_manifest(Path(folder))
            seconds = time.perf_counter() - begin
            private = (process.memory_full_info().uss - before) / 2**20
            plans = {batch: milliseconds_a_plan(manifest, batch) for batch in (32, 512, 2048)}
        told = ", ".join(f"{batch}: {plan:.1f}" for batch, plan in plans.items())
        print(
            f"{images:>10,} images: opened and checked in {seconds:.3f} s, {private:.1f} MB private, "
            f"{len(pickle.dumps(manifest))} bytes to another process; ms to plan a step of {told}"
        )
        if images <= 1_000_000:
            failed |= seconds > MOST_SECONDS or private > MOST_PRIVATE or plans[2048] > MOST_PLAN
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
