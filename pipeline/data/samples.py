"""The samples of a step: which, how augmented, and read from the shards as an image with its targets."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.config.sections import TrainSection
from pipeline.data.augment import DRAWS, Plan, Plans, plan_train
from pipeline.data.batching import cut_batch
from pipeline.data.images import BadImageError, Pixels, decode_image
from pipeline.data.index import Sample
from pipeline.data.labels import LabelMap
from pipeline.data.manifest import Manifest, UnreadableSampleError, describe, read_annotations, read_image_bytes
from pipeline.data.order import SampleOrder, seed_sequence
from pipeline.data.philox import philox

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StepPlan:
    """The samples of a step in the order of its micro-batches, and their augmentation."""

    indices: NDArray[np.int64]
    """[global_batch] into the manifest's samples."""
    plans: Plans

    def part(self, number: int, size: int) -> list[tuple[int, Plan]]:
        """The indices and plans of the micro-batch of a number."""
        return [(int(self.indices[n]), self.plans[n]) for n in range(number * size, (number + 1) * size)]


def plan_step(manifest: Manifest, order: SampleOrder, step: int, train: TrainSection) -> StepPlan:
    """The samples of a step, cut into micro-batches of like shapes: a function of the step alone."""
    return plan_steps(manifest, order, step, 1, train)[0]


def plan_steps(manifest: Manifest, order: SampleOrder, step: int, steps: int, train: TrainSection) -> list[StepPlan]:
    """The plans of some steps from one on: together they cost hardly more than one of a small global batch."""
    epochs, indices = order.step_samples(step, train.global_batch, steps)
    plans = plan_samples(manifest, epochs, indices, train)
    planned = []
    for begin in range(0, len(indices), train.global_batch):
        cut = begin + cut_batch(plans.size[begin : begin + train.global_batch], train.micro_batch)
        planned.append(StepPlan(indices[cut], plans.take(cut)))
    return planned


def plan_samples(
    manifest: Manifest, epochs: NDArray[np.int64], indices: NDArray[np.int64], train: TrainSection
) -> Plans:
    """The augmentation of samples [n] in epochs [n]: of each a function of (seed, epoch, dataset, image id)."""
    draws = np.empty((len(indices), DRAWS), dtype=np.uint64)
    image_ids = manifest.samples.rows["image_id"][indices].astype(np.uint64)
    for epoch in np.unique(epochs):
        own = epochs == epoch
        key = seed_sequence(manifest.digest, train.seed, int(epoch), 2).generate_state(2)
        draws[own] = _draws(image_ids[own], (int(key[0]), int(key[1])))
    return plan_train(manifest.samples.sizes(indices), draws, train.augment, epochs)


def _draws(image_ids: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """[n, DRAWS] 32-bit numbers of images."""
    low, high = image_ids & np.uint64(0xFFFFFFFF), image_ids >> np.uint64(32)
    blocks = [
        philox(np.stack([low, high, np.full_like(low, block), np.zeros_like(low)], axis=1), key)
        for block in range(DRAWS // 4)
    ]
    return np.concatenate(blocks, axis=1)


def load_image(manifest: Manifest, sample: Sample) -> Pixels:
    """The decoded image of a sample, uint8 [height, width, 3]. Raises `UnreadableSampleError`."""
    content = read_image_bytes(manifest, sample)
    try:
        return decode_image(content, sample.width, sample.height)
    except BadImageError as error:
        raise UnreadableSampleError(f"{describe(manifest, sample)}: {error}") from None


def load_train_sample(
    manifest: Manifest, sample: Sample, plan: Plan, out: Pixels | None = None
) -> tuple[Pixels, "dict[str, Tensor]"]:
    """The augmented image, written to `out` where that is given, and its targets.

    Crowd regions and boxes without area are left out.

    Raises:
        UnreadableSampleError: the shard's bytes are damaged.
    """
    annotations = read_annotations(manifest, sample)["annotations"]
    wanted = [annotation for annotation in annotations if not annotation["iscrowd"]]
    boxes, keep = plan.apply_boxes(xyxy([annotation["bbox"] for annotation in wanted]))
    labels = label_list(manifest.labels, [annotation["category_id"] for annotation in wanted])
    targets = make_targets(boxes[keep], [label for label, kept in zip(labels, keep, strict=True) if kept], plan.size)
    return plan.apply_image(load_image(manifest, sample), out), targets


def xyxy(boxes: list[list[float]]) -> NDArray[np.float64]:
    """COCO's xywh boxes as float [n, 4] xyxy."""
    array = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    return np.concatenate([array[:, :2], array[:, :2] + array[:, 2:]], axis=1)


def label_list(labels: LabelMap, category_ids: list[int]) -> list[int]:
    """The labels of category ids."""
    return [labels.label(category_id) for category_id in category_ids]


def make_targets(boxes: NDArray[np.float64], labels: list[int], size: tuple[int, int]) -> "dict[str, Tensor]":
    """The targets of one image.

    Args:
        boxes: float [n, 4] xyxy pixels.
        labels: of the boxes.
        size: (width, height) of the image in pixels.

    Returns:
        {"labels": int64 [n], "boxes": float32 [n, 4] cxcywh in 0..1}.
    """
    import torch  # here, so that whoever shards or only plans does without

    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    normalised = np.concatenate([centers, boxes[:, 2:] - boxes[:, :2]], axis=1) / np.array([*size, *size])
    return {
        "labels": torch.tensor(labels, dtype=torch.int64),
        "boxes": torch.from_numpy(normalised.astype(np.float32)),
    }
