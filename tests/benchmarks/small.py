"""Does a detector learn a few hundred photos from scratch? AP on its 160 training images, and on others.

    python tests/benchmarks/small.py [--sets drawn crops] [--bccd ../shared/data/bccd] [--set train.epochs=60 ...]
        [--beside OUT]

All by `jobs/configs/small.yaml`, crops for twice the epochs and without flips, in one process, on 160 training images
each:

| set   | images                                                                                              |
|-------|-----------------------------------------------------------------------------------------------------|
| drawn | 256 px, one class, one large animal with a spotted fur each, on clutter; 40 others are held out      |
| crops | of BCCD, resized to 256 px, one class, one large white blood cell each; 40 others are held out       |
| bccd  | the first of BCCD as they are, 3 classes; its validation split is held out                           |

AP on the training images tells whether they are learnt by heart, and the constant box (`pipeline.evaluate.baseline`)
what is scored without looking. What is done is kept in --out: the same command goes on from where it was stopped.
With --beside, the --out of another run, it also tells how far the best boxes of both overlap, and those of each with
the annotations: where two networks agree with each other more than with the annotations, these scatter.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from model.boxes import iou
from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.data.images import Pixels
from pipeline.data.manifest import Manifest
from pipeline.distributed import World, close, init_world
from pipeline.evaluate.detect import detect
from pipeline.evaluate.results import evaluate_checkpoint
from pipeline.log import set_up_logging
from pipeline.shard.coco import open_source
from pipeline.shard.write import shard_split
from pipeline.train.loop import train
from pipeline.train.run import TrainJob

SMALL = Path(__file__).resolve().parents[2] / "jobs" / "configs" / "small.yaml"
COUNTS = {"train": 160, "val": 40}
"""Images of the splits; of BCCD as it is all that are held out."""
SIDE = 256
WHITE_CELL = 2
"""BCCD's category of white blood cells."""
BY_HEART = 0.8
"""Least AP on the training images."""
BETTER = 2.0
"""Least AP on the validation images, in that of the constant box."""

Box = list[float]
"""xywh in pixels."""


class Example(NamedTuple):
    """An image and the box of its one object."""

    pixels: Pixels
    box: Box


def draw(split: int, number: int) -> Example:
    """A blob with a spotted fur of 0.35 to 1 of the image's sides, anywhere on clutter."""
    generator = np.random.default_rng([split, number])
    sides = (SIDE * generator.uniform(0.35, 1, 2)).astype(int)
    corner = (generator.random(2) * (SIDE - sides)).astype(int)
    angles = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    radii = 1 + sum(generator.uniform(-0.25, 0.25) / k * np.cos(k * angles + generator.uniform(0, 7))
                    for k in range(2, 7))  # fmt: skip
    outline = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    outline = (outline - outline.min(axis=0)) / np.ptp(outline, axis=0) * (sides - 1) + corner
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    cv2.fillPoly(mask, [np.round(outline).astype(np.int32)], 1)
    pixels = np.where(mask[..., None] > 0, _fur(generator), _clutter(generator)).astype(np.uint8)
    return Example(pixels, [float(value) for value in cv2.boundingRect(mask)])


def _fur(generator: np.random.Generator) -> Pixels:
    fur = np.array([200.0, 150, 90]) * generator.uniform(0.6, 1.1) + generator.normal(0, 12, (SIDE, SIDE, 3))
    pixels = fur.clip(0, 255).astype(np.uint8)
    for x, y, radius in generator.integers([0, 0, 3], [SIDE, SIDE, 8], (500, 3)).tolist():
        cv2.circle(pixels, (x, y), radius, (40, 30, 25), cv2.FILLED)
    return pixels


def _clutter(generator: np.random.Generator) -> Pixels:
    grid = generator.integers(40, 216, (6, 6, 3), dtype=np.uint8)
    pixels = np.asarray(cv2.resize(grid, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
    for number in range(40):
        colour = generator.integers(0, 256, 3).tolist()
        x, y, width, height = (*generator.integers(0, SIDE, 2).tolist(), *generator.integers(6, 70, 2).tolist())
        thickness = int(generator.choice([cv2.FILLED, 2, 5]))
        if number % 2:
            cv2.rectangle(pixels, (x, y), (x + width, y + height), colour, thickness)
        else:
            cv2.ellipse(pixels, (x, y), (width // 2, height // 2), 0, 0, 360, colour, thickness)
    return pixels


def crops(bccd: Path, split: str) -> Iterator[Example]:
    """Squares of BCCD's images of one white blood cell, which is 0.5 to 0.95 of their side and anywhere in them."""
    document = json.loads((bccd / "annotations" / f"instances_{split}.json").read_text(encoding="utf-8"))
    for image in document["images"]:
        cells = [annotation["bbox"] for annotation in document["annotations"]
                 if annotation["image_id"] == image["id"] and annotation["category_id"] == WHITE_CELL]  # fmt: skip
        if len(cells) != 1:
            continue
        generator = np.random.default_rng(image["id"])
        corner, sides = np.array(cells[0]).reshape(2, 2)
        size = np.array([image["width"], image["height"]])
        side = min(int(max(sides) / generator.uniform(0.5, 0.95)), *size)
        least, most = np.maximum(0, np.ceil(corner + sides - side)), np.minimum(np.floor(corner), size - side)
        if (most < least).any():
            continue  # the cell is greater than the square
        left, top = generator.integers(least.astype(int), most.astype(int), endpoint=True).tolist()
        pixels = cv2.cvtColor(cv2.imread(str(bccd / "images" / image["file_name"])), cv2.COLOR_BGR2RGB)
        cut = cv2.resize(pixels[top : top + side, left : left + side], (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        box = np.concatenate([corner - (left, top), sides]) * SIDE / side
        yield Example(np.asarray(cut, dtype=np.uint8), box.tolist())


def write_examples(root: Path, split: str, examples: Iterator[Example]) -> None:
    """The images of a split and their annotations, as COCO's."""
    (root / "images" / split).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number, (pixels, box) in enumerate(examples, start=1):
        name = f"{split}/{number:04d}.jpg"
        cv2.imwrite(str(root / "images" / name), cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
        images.append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": box,
                            "area": box[2] * box[3], "iscrowd": 0})  # fmt: skip
        if number == COUNTS[split]:
            break
    assert len(images) == COUNTS[split], f"{root}: {len(images)} images of {split}"
    write_document(root, split, {"images": images, "annotations": annotations,
                                 "categories": [{"id": 1, "name": "object"}]})  # fmt: skip


def write_document(root: Path, split: str, document: dict[str, Any]) -> None:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / f"{split}.json").write_text(json.dumps(document), encoding="utf-8")


def make_data(name: str, root: Path, bccd: Path) -> None:
    """Write a data set; the same images each time."""
    for number, split in enumerate(COUNTS):
        if name == "drawn":
            write_examples(root, split, (draw(number, index) for index in range(COUNTS[split])))
        elif name == "crops":
            write_examples(root, split, crops(bccd, split))
        else:
            document = json.loads((bccd / "annotations" / f"instances_{split}.json").read_text(encoding="utf-8"))
            images = document["images"][: COUNTS[split] if split == "train" else None]
            ids = {image["id"] for image in images}
            kept = [annotation for annotation in document["annotations"] if annotation["image_id"] in ids]
            write_document(root, split, {**document, "images": images, "annotations": kept})


def make_config(name: str, options: argparse.Namespace) -> Config:
    """`small.yaml` on a data set, in one process."""
    settings = {
        "name": name,
        "runs": options.out,
        "dataset.root": options.out / "data" / name,
        "cluster.workers": 1,
    }
    if name == "crops":  # photographs take twice the steps
        settings |= {"train.epochs": 80, "train.lr_drop_epochs": "[60]", "train.augment.flip": 0}
    elif name == "bccd":
        images = (options.bccd / "images").resolve()
        for split in COUNTS:
            settings[f"dataset.{split}"] = f"{{annotations: annotations/{split}.json, images: {images}}}"
    return load_config(SMALL, [*(f"{key}={value}" for key, value in settings.items()), *options.set])


def learn(config: Config, world: World) -> tuple[dict[str, dict[str, Any]], float]:
    """Train to the end; the metrics of the last checkpoint by split, and the minutes of the training."""
    manifests: dict[str, Manifest] = {}
    for name, split in (("train", config.dataset.train), ("val", config.dataset.val)):
        root = Path(config.dataset.root)
        source = open_source(root / split.annotations, root / split.images)
        manifests[name] = shard_split(source, name, config.shards_folder, config.dataset, config.shards)
    model = config.model_for(manifests["train"].labels.num_classes)
    begun = time.perf_counter()
    last = train(TrainJob(model, config.train, manifests["train"].folder, config.folder), world)
    minutes = (time.perf_counter() - begun) / 60
    metrics = {}
    for name, manifest in manifests.items():
        metrics[name], _ = evaluate_checkpoint(
            last,
            manifest,
            config.evaluate,
            config.folder.evaluation / name,
            lambda path, batches, manifest=manifest: [detect(path, manifest, batches, config.evaluate, world.device)],
        )
    return metrics, minutes


def best_boxes(out: Path, name: str, split: str) -> dict[int, Box]:
    """The box of the highest score in each image of a data set of one object each."""
    detections = json.loads((out / name / "evaluate" / split / "detections.json").read_text(encoding="utf-8"))
    return {each["image_id"]: each["bbox"] for each in sorted(detections, key=lambda each: float(each["score"]))}


def overlap(some: dict[int, Box], others: dict[int, Box]) -> float:
    """Mean IoU of the boxes of the same images."""
    first, second = (torch.tensor([boxes[image] for image in sorted(some)]) for boxes in (some, others))
    corners = (torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1) for boxes in (first, second))
    return float(iou(*corners).mean())


def print_overlaps(name: str, out: Path, beside: Path) -> None:
    """A line a split: the boxes of a run, of another one, and of the annotations."""
    for split in COUNTS:
        document = json.loads((out / "data" / name / "annotations" / f"{split}.json").read_text(encoding="utf-8"))
        truth = {annotation["image_id"]: annotation["bbox"] for annotation in document["annotations"]}
        own, other = (best_boxes(folder, name, split) for folder in (out, beside))
        numbers = f"{overlap(truth, own):.3f}, {overlap(truth, other):.3f}; of both {overlap(own, other):.3f}"
        print(f"{name} {split}: mean IoU of the best boxes with the annotations {numbers}", flush=True)


def main() -> int:
    """Print a row a data set; the exit code is 1 where one is not learnt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=("drawn", "crops", "bccd"), default=["drawn", "crops"],
                        help="data sets; bccd's many cells an image take longer")  # fmt: skip
    parser.add_argument("--bccd", type=Path, default=Path("../shared/data/bccd"), help="folder of BCCD")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting")
    parser.add_argument("--beside", type=Path, help="--out of another run, whose boxes are compared; not for bccd")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads")
    parser.add_argument("--out", type=Path, default=Path("runs/small"), help="folder of the data and the runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    set_up_logging()
    columns = ("AP train", "AP50 train", "AP val", "AP50 val", "constant AP", "constant AP50", "minutes")
    print(f"{'set':8}" + "".join(f"{column:>15}" for column in columns), flush=True)
    is_learnt = True
    world = init_world("cpu")
    try:
        for name in options.sets:
            make_data(name, options.out / "data" / name, options.bccd)
            metrics, minutes = learn(make_config(name, options), world)
            train, val = metrics["train"], metrics["val"]
            constant = val["baseline"]
            numbers = (*(part[key] for part in (train, val, constant) for key in ("AP", "AP50")),)
            row = "".join(f"{value:>15.3f}" for value in numbers)
            print(f"{name:8}{row}{minutes:>15.1f}", flush=True)
            if options.beside and name != "bccd":
                print_overlaps(name, options.out, options.beside)
            is_learnt &= train["AP"] >= BY_HEART and val["AP"] >= BETTER * constant["AP"]
    finally:
        close(world)
    print(f"{'yes' if is_learnt else 'NO'}: AP {BY_HEART} by heart, and {BETTER} times the constant box's beyond")
    return 0 if is_learnt else 1


if __name__ == "__main__":
    raise SystemExit(main())
