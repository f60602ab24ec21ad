"""Writing shards against GNU tar over the same files, in the same run; two processes against one core; and memory.

    python tests/benchmarks/sharding.py [--images N]

Ours also reads the annotation file, checks every image, takes checksums and sha256, and writes the JSON members and the
index. The files are drawn noise of about 150 KB each, in the page's cache for both. A process writes beside its
reading, so that it uses more than a core where there is one: two processes are compared with one that has a single
core. Times are the best of five: memory that a virtual machine has given back costs more than the work. The memory told
is that of a process that does all tasks of a split of small images one after the other, as a worker of Ray does.
"""

import argparse
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import cv2
import numpy as np

from pipeline.config.sections import DatasetSection, ShardsSection
from pipeline.shard.coco import open_source
from pipeline.shard.write import ShardPlan, WriteTask, WrittenShard, shard_split, write_in_a_row

WIDTH, HEIGHT = 640, 480
REPEATS = 5
SMALL_SPLITS = (10_000, 100_000)
MOST_GROWTH = {"train": 8, "train.tar": 32}
"""MiB by which a task's process may grow from the one split to the other: of an archive it lists the files."""


def draw(root: Path, count: int) -> None:
    images = root / "train"
    images.mkdir()
    choose = np.random.default_rng(0)
    contents = []
    for _ in range(16):
        small = choose.integers(0, 256, (HEIGHT // 3, WIDTH // 3, 3), dtype=np.uint8)
        _, content = cv2.imencode(".jpg", cv2.resize(small, (WIDTH, HEIGHT)), [cv2.IMWRITE_JPEG_QUALITY, 92])
        contents.append(content.tobytes())
    entries, annotations = [], []
    for number in range(1, count + 1):
        (images / f"{number:012d}.jpg").write_bytes(contents[number % 16])
        entries.append({"id": number, "file_name": f"{number:012d}.jpg", "width": WIDTH, "height": HEIGHT})
        for _ in range(7):
            left, top = int(choose.integers(0, 500)), int(choose.integers(0, 380))
            box = [left + 0.25, top + 0.5, 90.75, 70.5]
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": 1, "bbox": box,
                                "area": 6397.9, "iscrowd": 0})  # fmt: skip
    document = {"images": entries, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (root / "train.json").write_text(json.dumps(document))
    print(f"{count} files of {len(contents[0]) / 1024:.0f} KiB")


def draw_small(root: Path, count: int, images: str) -> None:
    """Images of a kilobyte with seven objects each, in a folder or a tar."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    content = cv2.imencode(".jpg", noise)[1].tobytes()
    names = [f"{number:012d}.jpg" for number in range(1, count + 1)]
    if images == "train":
        (root / images).mkdir()
        for name in names:
            (root / images / name).write_bytes(content)
    else:
        with tarfile.open(root / images, "w") as archive:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
                archive.members.clear()
    entries = [{"id": n, "file_name": name, "width": 32, "height": 24} for n, name in enumerate(names, start=1)]
    annotations = [
        {"id": n, "image_id": n // 7 + 1, "category_id": 1, "bbox": [1.25, 2.5, 20, 10], "area": 200, "iscrowd": 0}
        for n in range(7 * count)
    ]
    document = {"images": entries, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (root / "train.json").write_text(json.dumps(document))


def do_tasks(pipe: Connection) -> None:
    """Do a task for each plan that comes, then tell the process's peak of memory in MiB.

    That of getrusage would be its parent's, if that is larger: it is kept where a process becomes another program.
    """
    task = pipe.recv()
    while (plan := pipe.recv()) is not None:
        pipe.send(task(plan))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    pipe.send(int(status["VmHWM"].split()[0]) / 1024)


def peak_of_tasks(count: int, images: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw_small(root, count, images)
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=do_tasks, args=(theirs,))
        process.start()

        def write_all(plans: list[ShardPlan], task: WriteTask) -> Iterator[WrittenShard]:
            ours.send(task)
            for plan in plans:
                ours.send(plan)
                yield ours.recv()

        source = open_source(root / "train.json", root / images)
        shard_split(source, "train", root / "shards", DatasetSection(), ShardsSection(), write_all=write_all)
        ours.send(None)
        peak = float(ours.recv())
        process.join()
    return peak


def memory() -> bool:
    """Print the memory of a task's process for the two splits, and tell whether it grows as little as it has to."""
    is_flat = True
    for images, most in MOST_GROWTH.items():
        few, many = (peak_of_tasks(count, images) for count in SMALL_SPLITS)
        told = " and ".join(f"{count:,}" for count in SMALL_SPLITS)
        print(f"tasks of {told} images in {images}: {few:.0f} and {many:.0f} MiB, at most {most} more")
        is_flat = is_flat and many - few <= most
    return is_flat


def on_one_core(plans: list[ShardPlan], task: WriteTask) -> Iterator[WrittenShard]:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield from write_in_a_row(plans, task)
    finally:
        os.sched_setaffinity(0, cores)


def in_processes(plans: list[ShardPlan], task: WriteTask, pool: ProcessPoolExecutor) -> list[WrittenShard]:
    return list(pool.map(task, plans))


def shard(root: Path, write_all: Callable[[list[ShardPlan], WriteTask], object]) -> float:
    begin = time.perf_counter()
    source = open_source(root / "train.json", root / "train")
    shard_split(source, "train", root / "shards", DatasetSection(), ShardsSection(), write_all=write_all)  # type: ignore[arg-type]
    seconds = time.perf_counter() - begin
    shutil.rmtree(root / "shards")
    return seconds


def tar(root: Path) -> float:
    begin = time.perf_counter()
    subprocess.run(["tar", "cf", root / "all.tar", "-C", root, "train"], check=True)
    subprocess.run(["sync", root / "all.tar"], check=True)  # ours is on the disk, too
    seconds = time.perf_counter() - begin
    (root / "all.tar").unlink()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2) as pool:
        root = Path(folder)
        draw(root, options.images)
        list(pool.map(abs, range(2)))
        ways = (write_in_a_row, on_one_core, partial(in_processes, pool=pool))
        runs = [(tar(root), *(shard(root, way) for way in ways)) for _ in range(REPEATS)]
    theirs, one, one_core, two = (min(times) for times in zip(*runs, strict=True))
    print(f"tar {theirs:.1f} s; one process {one:.1f} s: {theirs / one:.2f} of its speed, at least 0.45")
    print(f"two processes {two:.1f} s, one on one core {one_core:.1f} s: {one_core / two:.2f} times that, at least 1.3")
    if not memory() or theirs / one < 0.45 or one_core / two < 1.3:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
