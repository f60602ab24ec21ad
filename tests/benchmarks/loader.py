"""What one core makes ready for training, against its bare work and against the original's loader, in the same run.

    python tests/benchmarks/loader.py

Bare work: cv2 decodes the bytes of the same samples, which are in memory, and makes the same crops and resizes of them;
no targets, no batches, no checks. The original's: Pillow decodes files and resizes, crops and resizes as
facebookresearch/detr does. Then the padding of the micro-batches, and what the members' checksums cost.
"""

import argparse
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from common import seconds
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.sections import AugmentSection, DatasetSection, ShardsSection, TrainSection
from pipeline.data.augment import DRAWS, Plan, plan_train
from pipeline.data.batching import CANVAS_MULTIPLE, cut_batch
from pipeline.data.loader import TrainLoader
from pipeline.data.manifest import Manifest, read_image_bytes
from pipeline.data.order import SampleOrder
from pipeline.data.samples import plan_step
from pipeline.plan.data import COCO_SIZES
from pipeline.shard.coco import open_source
from pipeline.shard.write import shard_split

STEPS = 100
REPEATS = 9
TRAIN = TrainSection(global_batch=2, micro_batch=2, loader_workers=0)


def ours(manifest: Manifest, order: SampleOrder) -> Callable[[], object]:
    loader = TrainLoader(manifest, order, TRAIN, rank=0, world=1, start_step=0, stop_step=STEPS)
    return lambda: [step.step for step in loader]


def planned(manifest: Manifest, order: SampleOrder) -> list[tuple[int, Plan]]:
    """The same samples with the same plans."""
    return [pair for step in range(STEPS) for pair in plan_step(manifest, order, step, TRAIN).part(0, 2)]


def bare(contents: list[bytes], pairs: list[tuple[int, Plan]]) -> Callable[[], object]:
    def run() -> None:
        for index, plan in pairs:
            pixels = cv2.imdecode(np.frombuffer(contents[index], np.uint8), cv2.IMREAD_COLOR_RGB)
            left, top, width, height = plan.crop or (0, 0, *plan.source)
            part = pixels[top : top + height, left : left + width]
            shrinks = plan.size[0] * plan.size[1] < width * height
            cv2.resize(part, plan.size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)

    return run


def originals(paths: list[Path], pairs: list[tuple[int, Plan]]) -> Callable[[], object]:
    """The crop is taken from an image that was resized to 500 first, as on average there."""

    def run() -> None:
        for index, plan in pairs:
            image: Image.Image = Image.open(paths[index]).convert("RGB")
            if plan.crop is not None and plan.crop[2:] != plan.source:
                scale = 500 / min(image.size)
                image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BILINEAR)
                left, top, width, height = (round(value * scale) for value in plan.crop)
                image = image.crop((left, top, left + width, top + height))
            image = image.resize(plan.size, Image.BILINEAR)
            if plan.flip:
                image = image.transpose(Image.FLIP_LEFT_RIGHT)
            torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    return run


def checksums(contents: list[bytes]) -> Callable[[], object]:
    return lambda: [zlib.crc32(content) for content in contents]


def wasted(cut: Callable[[NDArray[np.int64], int], NDArray[np.int64]], batch: int, micro: int, multiple: int) -> float:
    """The share of the canvases' pixels that is padding, over 50 global batches."""
    used = total = 0
    choose = np.random.default_rng(0)
    for _ in range(50):
        draws = choose.integers(0, 2**32, (batch, DRAWS), dtype=np.uint64)
        sizes = plan_train(COCO_SIZES[choose.integers(0, len(COCO_SIZES), batch)], draws, AugmentSection()).size
        canvases = sizes[cut(sizes, micro)].reshape(-1, micro, 2).max(axis=1)
        used += int(sizes.prod(axis=1).sum())
        total += int((-(-canvases // multiple) * multiple).prod(axis=1).sum()) * micro
    return 1 - used / total


def by_aspect(sizes: NDArray[np.int64], micro: int) -> NDArray[np.int64]:
    return np.argsort(sizes[:, 0] / sizes[:, 1], kind="stable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/tiny_coco"), help="a COCO folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    split = DatasetSection().train
    source = open_source(options.data / split.annotations, options.data / split.images)
    paths = {image["id"]: options.data / split.images / image["file_name"] for image in source.document["images"]}
    with tempfile.TemporaryDirectory() as folder:
        manifest = shard_split(source, "train", Path(folder), DatasetSection(), ShardsSection(max_samples=16))
        order = SampleOrder(manifest.digest, manifest.shard_sizes, TRAIN.seed, TRAIN.window)
        pairs = planned(manifest, order)
        contents = [read_image_bytes(manifest, sample) for sample in manifest.samples]
        files = [paths[sample.image_id] for sample in manifest.samples]
        calls = [ours(manifest, order), bare(contents, pairs), originals(files, pairs), checksums(contents)]
        mine, least, theirs, checked = seconds(calls, REPEATS)
        checksum = checked / len(contents)
    count = len(pairs)
    print(f"loader, one core: {count / mine:.0f} images/s")
    print(f"  against bare cv2 decode and the same resizes ({count / least:.0f}): {least / mine:.2f}, at least 0.7")
    print(f"  against the original's with Pillow ({count / theirs:.0f}): {theirs / mine:.2f}, at least 2.5")
    print(f"  checksums: {100 * checksum * count / mine:.1f} % of it, at most 2")
    for batch, micro in ((32, 2), (32, 4), (128, 8)):
        told = [
            f"{100 * wasted(cut, batch, micro, multiple):.1f}"
            for cut in (by_aspect, cut_batch)
            for multiple in (1, CANVAS_MULTIPLE)
        ]
        print(f"  padding at {batch} by {micro}, sorted by aspect / ours, in multiples of 1, 32: {', '.join(told)} %")
    if least / mine < 0.7 or theirs / mine < 2.5 or checksum * count / mine > 0.02:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
