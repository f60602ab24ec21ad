"""Small datasets, targets and batches for the tests."""

import json
import resource
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from model import DetrConfig, build_model
from model.batch import ImageBatch, PixelBatch
from pipeline.checkpoint.state import MODEL, OPTIMIZER, STATE, State
from pipeline.config.sections import AugmentSection, DatasetSection, OnError, ShardsSection, SplitSection, TrainSection
from pipeline.config.values import plain
from pipeline.data.labels import LabelMap
from pipeline.data.manifest import Manifest
from pipeline.shard.coco import CocoSplit, clean, open_source
from pipeline.shard.write import shard_split

CATEGORIES: tuple[dict[str, Any], ...] = (
    {"id": 1, "name": "cat"},
    {"id": 3, "name": "dog"},
    {"id": 90, "name": "toothbrush"},
)


class CocoFiles(NamedTuple):
    """A split on disk."""

    annotations: Path
    images: Path


def make_image(width: int = 32, height: int = 24, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth random pixels, uint8 [height, width, 3]."""
    grid = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(grid).resize((width, height), Image.Resampling.BILINEAR))


def write_image(
    path: Path,
    width: int = 32,
    height: int = 24,
    *,
    mode: str = "RGB",
    orientation: int | None = None,
    seed: int = 0,
) -> Path:
    """A JPEG or PNG, by the suffix; `mode` is Pillow's, `orientation` the EXIF one."""
    image = Image.fromarray(make_image(width, height, seed)).convert(mode)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, exif=exif)
    return path


def make_annotation(
    annotation_id: int, image_id: int, bbox: Sequence[float] = (2, 3, 10, 8), category_id: int = 1, **more: Any
) -> dict[str, Any]:
    """An annotation; `bbox` is xywh pixels."""
    area = bbox[2] * bbox[3] if len(bbox) == 4 else 0
    annotation = {"id": annotation_id, "image_id": image_id, "category_id": category_id, "bbox": list(bbox)}
    return {**annotation, "area": area, "iscrowd": 0, **more}


def write_coco(
    root: Path,
    images: Iterable[dict[str, Any] | int] = (1, 2, 3),
    annotations: Iterable[dict[str, Any]] = (),
    *,
    split: str = "train",
    categories: Iterable[dict[str, Any]] = CATEGORIES,
    draw: bool = True,
) -> CocoFiles:
    """A split below `root`: annotations/<split>.json and <split>/.

    An image is its id, or a dictionary with at least `id`; the rest is filled in (32x24 JPEG). Files that are there
    already are kept; with draw=False none is written.
    """
    files = CocoFiles(root / "annotations" / f"{split}.json", root / split)
    entries = []
    for image in images:
        given = {"id": image} if isinstance(image, int) else image
        entry = {"file_name": f"{given['id']:012d}.jpg", "width": 32, "height": 24, **given}
        entries.append(entry)
        path = files.images / entry["file_name"]
        if draw and not path.exists():
            write_image(path, entry["width"], entry["height"], seed=entry["id"])
    document = {"images": entries, "annotations": list(annotations), "categories": list(categories)}
    files.images.mkdir(parents=True, exist_ok=True)
    files.annotations.parent.mkdir(parents=True, exist_ok=True)
    files.annotations.write_text(json.dumps(document))
    return files


def read_coco(annotations: Path, images: Path, on_error: OnError) -> CocoSplit:
    """A split that passed the rules."""
    return clean(open_source(annotations, images), on_error)


def make_dataset_section(root: Path, on_error: OnError = "fail", **more: Any) -> DatasetSection:
    """The configuration of splits `train` and `val` that `write_coco` wrote below `root`."""
    sections = {
        split: SplitSection(annotations=f"annotations/{split}.json", images=split) for split in ("train", "val")
    }
    return DatasetSection.model_validate({"root": str(root), "on_error": on_error, **sections, **more})


def make_manifest(
    root: Path,
    images: Iterable[dict[str, Any] | int] = (1, 2, 3),
    annotations: Iterable[dict[str, Any]] = (),
    *,
    split: str = "train",
    max_samples: int = 1000,
    on_error: OnError = "fail",
    **more: Any,
) -> Manifest:
    """A split that `write_coco` wrote below `root`, sharded into <root>/shards."""
    files = write_coco(root, images, annotations, split=split)
    dataset = make_dataset_section(root, on_error, **more)
    source = open_source(files.annotations, files.images)
    return shard_split(source, split, root / "shards", dataset, ShardsSection(max_samples=max_samples))


def make_varied_manifest(root: Path, count: int, max_samples: int = 1000) -> Manifest:
    """`count` images of several shapes with 0 to 3 objects each, sharded."""
    generator = np.random.default_rng(count)
    images = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, count + 1):
        width, height = (int(side) for side in generator.integers(24, 49, 2))
        images.append({"id": image_id, "width": width, "height": height})
        for _ in range(int(generator.integers(0, 4))):
            box = [*(int(v) for v in generator.integers(0, 12, 2)), *(int(v) for v in generator.integers(4, 12, 2))]
            category_id = int(generator.choice([1, 3, 90]))
            annotations.append(make_annotation(len(annotations) + 1, image_id, box, category_id))
    return make_manifest(root, images, annotations, max_samples=max_samples)


def spoil(manifest: Manifest, *image_ids: int) -> None:
    """Overwrite images in the shards by zeros."""
    for sample in manifest.samples:
        if sample.image_id in image_ids:
            with (manifest.folder / manifest.shards[sample.shard].name).open("r+b") as file:
                file.seek(sample.image.offset)
                file.write(bytes(sample.image.size))


def make_target(count: int, num_classes: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """The targets of an image: {"labels": int64 [count], "boxes": float32 [count, 4] cxcywh inside 0..1}."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 0.05 + 0.4 * torch.rand(count, 2, generator=generator)
    centers = sizes / 2 + (1 - sizes) * torch.rand(count, 2, generator=generator)
    labels = torch.randint(num_classes, (count,), generator=generator)
    return {"labels": labels, "boxes": torch.cat([centers, sizes], dim=1)}


def make_batch(sizes: Sequence[tuple[int, int]] = ((64, 96), (80, 64)), seed: int = 0) -> ImageBatch:
    """A normalised batch of images with the given (height, width), on the host."""
    images = [make_image(width, height, seed + number) for number, (height, width) in enumerate(sizes)]
    return PixelBatch.collate(images).to("cpu")


def make_detector(seed: int = 0, **settings: Any) -> Any:
    """A small detector with initial weights; `settings` are of `DetrConfig`."""
    small: dict[str, Any] = {"backbone": "resnet_tiny", "backbone_norm": "group_norm", "hidden_dim": 32, "heads": 4}
    small |= {"ffn_dim": 48, "num_queries": 12, "num_classes": 5, "encoder_layers": 1, "decoder_layers": 3}
    small |= {"feature_levels": 1, "class_loss": "softmax"} if settings.get("arch") == "detr" else {"points": 2}
    return build_model(DetrConfig(**(small | settings)), torch.Generator().manual_seed(seed))


def write_checkpoint(folder: Path, labels: LabelMap, step: int = 5, seed: int = 0) -> Path:
    """A checkpoint of a small untrained detector below `folder`, from before sums were kept.

    It cannot be trained on: its optimizer's state is empty.
    """
    config = DetrConfig(
        backbone="resnet_tiny", backbone_norm="group_norm", num_classes=labels.num_classes, num_queries=8,
        hidden_dim=32, heads=2, encoder_layers=1, decoder_layers=1, ffn_dim=32, points=2, feature_levels=3, dropout=0.0,
    )  # fmt: skip
    model = build_model(config, torch.Generator().manual_seed(seed))
    state = State(
        step=step,
        epoch=1,
        samples=10 * step,
        skipped=0,
        seeds={"train": seed},
        world_size=1,
        zero_stage=0,
        config={
            "model": plain(config),
            "train": plain(TrainSection(augment=AugmentSection(short_sides=(48, 64), max_side=96))),
        },
        labels=labels.to_json(),
        data_digest="0123456789abcdef",
        groups=(),
    )
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, path / MODEL)
    save_file({}, path / OPTIMIZER)
    (path / STATE).write_text(json.dumps(asdict(state)))
    return path


def without_sums(path: Path, change: Callable[[dict[str, Any]], Any] = lambda _: None) -> None:
    """Make a checkpoint one from before sums were kept, and change its state."""
    state = json.loads((path / STATE).read_text())
    for key in ("files", "digest"):
        state.pop(key, None)
    change(state)
    (path / STATE).write_text(json.dumps(state))


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Writing a file beyond `size` bytes fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
