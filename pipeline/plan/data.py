"""The data that a plan is made for, and the canvases that training makes of its images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.config.sections import Config, TrainSection
from pipeline.data.augment import DRAWS, Sizes, plan_train
from pipeline.data.batching import CANVAS_MULTIPLE, cut_batch
from pipeline.data.cache import cache_of
from pipeline.data.labels import COCO91_LOGITS
from pipeline.data.manifest import MANIFEST_NAME, read_manifest
from pipeline.errors import UserError
from pipeline.shard.document import read_large_document
from pipeline.shard.synthetic import CATEGORIES
from pipeline.store import StorePath, size_of

COCO_SIZES = np.array(
    [(640, 480)] * 28 + [(640, 427)] * 24 + [(480, 640)] * 11 + [(427, 640)] * 8 + [(500, 375)] * 6
    + [(640, 360), (640, 425), (640, 428)] * 4 + [(375, 500), (500, 333), (612, 612), (640, 640)] * 2
)  # fmt: skip
"""(width, height) as they are frequent in COCO."""
BYTES_PER_PIXEL = 0.58
"""Of an image file, as COCO's have: 19.3 GB over the 118,287 of train2017, which have 0.28 million pixels each."""
MOST_SIZES = 100_000
"""Images of shards whose sizes are looked at, evenly spread."""
DRAWN = 4096
"""Images whose augmentation is drawn to see what canvases there are."""


@dataclass(frozen=True)
class PlannedData:
    """A training split, as far as a plan needs it."""

    source: str
    """Where this is known from, for people."""
    images: int
    """Images of an epoch."""
    bytes: int
    """Bytes of its shards, or of its image files by `BYTES_PER_PIXEL`."""
    sizes: Sizes
    """[n, 2] (width, height) of its images, or of some like them."""
    classes: int | None
    """Logits of a model for it, without "no object"; None where nothing tells."""
    whole_shards: bool
    """Whether every machine fetches all shards, as from a store, or reads its own samples alone."""


def planned_data(config: Config, images: int | None = None) -> PlannedData:
    """What is known of the training split: from its shards, else from what they will be made of.

    Args:
        config: the pipeline.
        images: plan for so many images like COCO's instead.

    Raises:
        UserError: there is no data, and `images` does not say how much there will be; or it is damaged.
    """
    folder, dataset = config.shards_folder / "train", config.dataset
    classes = COCO91_LOGITS if dataset.labels == "coco91" else None
    whole_shards = isinstance(folder, StorePath)
    if images is not None:
        return _unsharded("--images, of sizes as COCO's", images, COCO_SIZES, classes, whole_shards)
    if size_of(folder / MANIFEST_NAME) is not None:
        manifest = read_manifest(folder, cache_of(config.shards))
        total = sum(shard.bytes for shard in manifest.shards)
        count = len(manifest.samples)
        some = manifest.samples.sizes(np.arange(0, count, -(-count // MOST_SIZES)))
        return PlannedData(f"{folder}", count, total, some, manifest.labels.num_classes, whole_shards)
    if dataset.synthetic is not None:
        square = np.full((1, 2), dataset.synthetic.image_size)
        count = dataset.synthetic.train_images
        return _unsharded("dataset.synthetic", count, square, classes or len(CATEGORIES), whole_shards)
    path = dataset.place / dataset.train.annotations
    document = read_large_document(path, "annotation file", "; give --images to plan without it")[1]
    try:
        sizes = np.array([(image["width"], image["height"]) for image in document["images"]], dtype=np.int64)
        classes = classes or len(document["categories"])
        if sizes.min() < 1:
            raise ValueError("an image without pixels")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a COCO annotation file ({error}); `raydetr inspect --data` tells more") from None
    return _unsharded(f"{path}", len(sizes), sizes, classes, whole_shards)


def _unsharded(source: str, images: int, sizes: Sizes, classes: int | None, whole_shards: bool) -> PlannedData:
    """Data whose bytes are guessed from its pixels."""
    total = round(images * sizes.prod(axis=1).mean() * BYTES_PER_PIXEL)
    return PlannedData(source, images, total, sizes, classes, whole_shards)


def draw_canvases(sizes: Sizes, train: TrainSection) -> NDArray[np.int64]:
    """Height and width [n, 2] of the canvases of micro-batches that all epochs would make of images of these sizes."""
    choose = np.random.default_rng(0)
    canvases = []
    batches = -(-DRAWN // train.global_batch)
    for number in range(batches):
        draws = choose.integers(0, 2**32, (train.global_batch, DRAWS), dtype=np.uint64)
        sources = sizes[choose.integers(0, len(sizes), train.global_batch)]
        augmented = plan_train(sources, draws, train.augment, number * train.epochs // batches).size
        cut = augmented[cut_batch(augmented, train.micro_batch)].reshape(-1, train.micro_batch, 2)
        canvases.append(cut.max(axis=1)[:, ::-1])
    return -(-np.concatenate(canvases) // CANVAS_MULTIPLE) * CANVAS_MULTIPLE
