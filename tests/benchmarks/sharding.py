"""Speed of writing shards, against GNU tar over the same files, and of two workers against one, in the same run.

    python tests/benchmarks/sharding.py

Ours is everything from the annotation file to the manifest: the rules, every image's checks, CRC-32, sha256, and the
shards flushed to the disk, which tar does not do. They take turns; the figures are medians. Two workers are compared
by the writing alone, as Ray's tasks do it. About 3 GB below --folder are needed.
"""

import argparse
import io
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config.sections import DatasetSection, ShardsSection
from pipeline.shard.coco import open_source
from pipeline.shard.write import ShardPlan, WriteAll, WriteTask, WrittenShard, shard_split, write_in_a_row

LEAST_OF_TAR = 0.8
LEAST_OF_TWO = 1.7
WIDTH, HEIGHT = 640, 480
PICTURES = 20
OBJECTS = 7
"""Of an image, as in COCO."""


def picture(generator: np.random.Generator) -> bytes:
    """A noisy JPEG of about 150 KB."""
    grid = Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    smooth = np.asarray(grid.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = np.clip(smooth + generator.integers(-34, 35, smooth.shape), 0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(noisy).save(content, "JPEG", quality=87)
    return content.getvalue()


def write_dataset(root: Path, count: int) -> None:
    """`root/train.json` and `root/train/`."""
    generator = np.random.default_rng(0)
    pictures = [picture(generator) for _ in range(PICTURES)]
    images, annotations = [], []
    (root / "train").mkdir(parents=True)
    for number in range(1, count + 1):
        name = f"{number:012d}.jpg"
        (root / "train" / name).write_bytes(pictures[number % PICTURES])
        images.append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for x, y, width, height in generator.uniform(1, 230, (OBJECTS, 4)).round(2).tolist():
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": 0}
            annotations.append({**entry, "bbox": [x, y, width, height], "area": width * height})
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (root / "train.json").write_text(json.dumps(document))


def shard(root: Path, out: Path, write_all: WriteAll = write_in_a_row) -> None:
    source = open_source(root / "train.json", root / "train")
    shard_split(source, "train", out, DatasetSection(), ShardsSection(), write_all=write_all)


def writing_with(pool: Pool, took: list[float]) -> WriteAll:
    """Writes by the processes of a pool, and appends the seconds of it."""

    def write_all(plans: list[ShardPlan], task: WriteTask) -> Iterator[WrittenShard]:
        begin = time.perf_counter()
        yield from pool.imap_unordered(task, plans)
        took.append(time.perf_counter() - begin)

    return write_all


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(root: Path, repeats: int) -> tuple[list[float], list[float], dict[int, list[float]]]:
    """Seconds of tar, of ours, and of the writing by one and by two workers; the first turn warms up."""
    out, packed = root / "shards", root / "all.tar"
    tars: list[float] = []
    ours: list[float] = []
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1) as one, spawn.Pool(2) as two:
        workers: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(repeats + 1):
            tars.append(seconds(lambda: subprocess.run(["tar", "cf", packed, "-C", root, "train"], check=True)))
            packed.unlink()
            ours.append(seconds(lambda: shard(root, out)))
            shutil.rmtree(out)
            for number, pool in ((1, one), (2, two)):
                shard(root, out, writing_with(pool, workers[number]))
                shutil.rmtree(out)
    return tars[1:], ours[1:], {number: own[1:] for number, own in workers.items()}


def main() -> int:
    """Print the table; the exit code is 1 if a ratio is below its least."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure; the default is the system's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_dataset(Path(folder), options.images)
        measured = measure(Path(folder), options.repeats)
    tar, own = (statistics.median(times) for times in measured[:2])
    one, two = (statistics.median(measured[2][number]) for number in (1, 2))
    missed = 0
    print(f"{'what':30} {'other s':>8} {'raydetr s':>9} {'ratio':>6} {'least':>6}")
    rows = (
        ("one process against tar", tar, own, LEAST_OF_TAR),
        ("two workers against one", one, two, LEAST_OF_TWO),
    )
    for what, other, ours, least in rows:
        missed += other / ours < least
        print(f"{what:30} {other:8.2f} {ours:9.2f} {other / ours:6.2f} {least:6.2f}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
