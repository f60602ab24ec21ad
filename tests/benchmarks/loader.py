"""Images a second that one core makes ready for training, against webdataset's own pipeline, in the same run.

    python tests/benchmarks/loader.py

Both read the same tars and give uint8 pixels resized to the published augmentation's sizes (short side 480 to 800);
ours also flips, crops, moves the boxes and pads batches.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from pipeline.config.sections import AugmentSection, DatasetSection, ShardsSection, TrainSection
from pipeline.data.augment import resized
from pipeline.data.loader import TrainLoader
from pipeline.data.manifest import Manifest
from pipeline.data.order import SampleOrder
from pipeline.shard.coco import open_source
from pipeline.shard.write import shard_split

IMAGES = 200


def ours(manifest: Manifest) -> Iterator[int]:
    train = TrainSection(global_batch=2, micro_batch=2, loader_workers=0)
    order = SampleOrder(manifest.digest, manifest.shard_sizes, train.seed, train.window)
    loader = TrainLoader(manifest, order, train, rank=0, world=1, start_step=0, stop_step=10**6)
    for step in loader:
        yield sum(len(micro.image_ids) for micro in step.micro_batches)


def webdatasets(manifest: Manifest) -> Iterator[int]:
    paths = [str(manifest.folder / shard.name) for shard in manifest.shards]
    sides, generator = AugmentSection().short_sides, random.Random(0)
    while True:
        for sample in webdataset.WebDataset(paths, shardshuffle=False).shuffle(100).decode("pil"):
            image: Image.Image = sample.get("jpg") or sample["png"]
            size = resized(image.size, generator.choice(sides), AugmentSection().max_side)
            np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))
            yield 1


def images_per_second(batches: Iterator[int]) -> float:
    next(batches)
    begun, done = time.perf_counter(), 0
    while done < IMAGES:
        done += next(batches)
    return done / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/tiny_coco"), help="a COCO folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    split = DatasetSection().train
    source = open_source(options.data / split.annotations, options.data / split.images)
    with tempfile.TemporaryDirectory() as folder:
        manifest = shard_split(source, "train", Path(folder), DatasetSection(), ShardsSection(max_samples=16))
        mine, theirs = images_per_second(ours(manifest)), images_per_second(webdatasets(manifest))
    print(f"loader, one core: {mine:.0f} images/s; webdataset with Pillow: {theirs:.0f}; ratio {mine / theirs:.2f}")


if __name__ == "__main__":
    main()
