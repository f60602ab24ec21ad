"""What a split of many images costs every process: opening its manifest, planning a step, beginning in mid-epoch.

    python tests/benchmarks/scale.py

The indexes are made up (rows of COCO's sizes, 1000 a shard); the shards are empty files. A resume is read from whole
ones, which are one tar of drawn pictures of 640 x 480 (JPEG, 100 kB) under 118 names. Each is a process of its own:
with loader processes their import of torch counts from the start ("at once"), or begins while DeepSpeed is imported,
as in a training process.
"""

import json
import multiprocessing
import os
import pickle
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import psutil

from pipeline.config.sections import TrainSection
from pipeline.data.index import INDEX_NAME, ROW, Sample, to_rows
from pipeline.data.labels import Category, LabelMap
from pipeline.data.loader import TrainLoader, prepare_workers
from pipeline.data.manifest import Manifest, Shard, read_manifest, write_manifest
from pipeline.data.order import SampleOrder
from pipeline.data.samples import plan_step
from pipeline.shard.tar import ShardTar

SAMPLES = 1000
SHAPES = np.array([(640, 480), (480, 640), (640, 427), (427, 640), (500, 375)])
MOST_SECONDS, MOST_PRIVATE, MOST_PLAN, MOST_FIRST = 0.1, 40, 2.0, 2.0


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


def make_whole(folder: Path, shards: int) -> None:
    """Shards that can be read: the first one, under other names."""
    choose = np.random.default_rng(0)
    samples = []
    with (folder / "shard-000000.tar").open("wb") as file, ShardTar(file) as tar:
        for number in range(SAMPLES):
            grid = choose.integers(0, 256, (60, 80, 3), dtype=np.uint8)
            picture = cv2.resize(grid, (640, 480), interpolation=cv2.INTER_CUBIC)
            jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
            box = {
                "id": number,
                "image_id": number,
                "category_id": 1,
                "bbox": [9, 9, 90, 90],
                "area": 8100,
                "iscrowd": 0,
            }
            told = {"image_id": number, "file_name": "", "width": 640, "height": 480, "annotations": [box] * 7}
            image = tar.add(f"{number:012d}.jpg", jpeg)
            member = tar.add(f"{number:012d}.json", json.dumps(told).encode())
            samples.append(Sample(number, 640, 480, 0, "jpg", image, member))
    np.save(folder / INDEX_NAME, np.tile(to_rows(samples), shards))
    parts = [Shard(f"shard-{number:06d}.tar", SAMPLES, tar.size, tar.sha256) for number in range(shards)]
    for part in parts[1:]:
        os.link(folder / parts[0].name, folder / part.name)
    write_manifest(folder, "train", LabelMap("contiguous", (Category(1, "thing"),)), "0" * 64, {}, parts, {})


def first_step(folder: Path, workers: int, at_once: bool, told: "multiprocessing.Queue[float]") -> None:
    """Seconds from the start of the loader to the first step, 32 images in the middle of the fourth epoch."""
    train = TrainSection(loader_workers=workers)
    if not at_once:
        os.environ["DS_ACCELERATOR"] = "cpu"  # whatever there is
        prepare_workers(workers)
        import deepspeed  # noqa: F401
    begin = time.perf_counter()
    manifest = read_manifest(folder)
    order = SampleOrder(manifest.digest, manifest.shard_sizes, train.seed, train.window)
    start = int(3.5 * len(manifest.samples)) // train.global_batch
    steps = iter(TrainLoader(manifest, order, train, rank=0, world=1, start_step=start, stop_step=start + 100))
    next(steps)
    told.put(time.perf_counter() - begin)
    steps.close()  # type: ignore[attr-defined]


def seconds_to_resume(folder: Path, workers: int, at_once: bool) -> float:
    context = multiprocessing.get_context("spawn")
    times = []
    for _ in range(3):
        told: multiprocessing.Queue[float] = context.Queue()
        process = context.Process(target=first_step, args=(folder, workers, at_once, told))
        process.start()
        times.append(told.get(timeout=120))
        process.join()
    return statistics.median(times)


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
    with tempfile.TemporaryDirectory() as folder:
        make_whole(Path(folder), 118)
        first = {f"{n} processes": seconds_to_resume(Path(folder), n, at_once=False) for n in (0, 2)}
        cold = seconds_to_resume(Path(folder), 2, at_once=True)
    told = ", ".join(f"{kind}: {seconds:.2f}" for kind, seconds in first.items())
    print(f"   118,000 images: s to the first step of a resume in mid-epoch, {told}, at once: {cold:.2f}")
    failed |= max(first.values()) > MOST_FIRST
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
