"""The samples of a step: which, how augmented, and read from the shards as an image with its targets."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.sections import AugmentSection
from pipeline.data.augment import Plan, plan_train
from pipeline.data.images import BadImageError, Pixels, decode_image
from pipeline.data.labels import LabelMap
from pipeline.data.manifest import (
    Manifest,
    Sample,
    UnreadableSampleError,
    describe,
    read_annotations,
    read_image_bytes,
)
from pipeline.data.order import SampleOrder, seed_sequence


@dataclass(frozen=True)
class PlannedSample:
    """One sample of a step with its augmentation."""

    epoch: int
    index: int
    plan: Plan


def sample_plan(digest: str, seed: int, epoch: int, sample: Sample, augment: AugmentSection) -> Plan:
    """The augmentation of a sample in an epoch: a function of (seed, epoch, dataset, image id)."""
    generator = np.random.Generator(np.random.Philox(seed_sequence(digest, seed, epoch, 2, sample.image_id)))
    return plan_train(sample.width, sample.height, generator, augment)


def plan_step(
    manifest: Manifest, order: SampleOrder, step: int, global_batch: int, seed: int, augment: AugmentSection
) -> list[PlannedSample]:
    """The samples of a step sorted by augmented aspect ratio; equal ones stay in the order of the stream."""
    planned = [
        PlannedSample(epoch, index, sample_plan(manifest.digest, seed, epoch, manifest.samples[index], augment))
        for epoch, index in order.step_samples(step, global_batch)
    ]
    return sorted(planned, key=lambda sample: sample.plan.aspect)


def load_image(manifest: Manifest, sample: Sample) -> Pixels:
    """The decoded image of a sample, uint8 [height, width, 3]. Raises `UnreadableSampleError`."""
    content = read_image_bytes(manifest, sample)
    try:
        return decode_image(content, sample.width, sample.height)
    except BadImageError as error:
        raise UnreadableSampleError(f"{describe(manifest, sample)}: {error}") from None


def load_train_sample(manifest: Manifest, sample: Sample, plan: Plan) -> tuple[Pixels, dict[str, Tensor]]:
    """The augmented image and its targets: crowd regions and boxes without area are left out.

    Raises:
        UnreadableSampleError: the shard's bytes are damaged.
    """
    annotations = read_annotations(manifest, sample)["annotations"]
    wanted = [annotation for annotation in annotations if not annotation["iscrowd"]]
    boxes, keep = plan.apply_boxes(xyxy([annotation["bbox"] for annotation in wanted]))
    labels = label_list(manifest.labels, [annotation["category_id"] for annotation in wanted])
    targets = make_targets(boxes[keep], [label for label, kept in zip(labels, keep, strict=True) if kept], plan.size)
    return plan.apply_image(load_image(manifest, sample)), targets


def xyxy(boxes: list[list[float]]) -> NDArray[np.float64]:
    """COCO's xywh boxes as float [n, 4] xyxy."""
    array = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    return np.concatenate([array[:, :2], array[:, :2] + array[:, 2:]], axis=1)


def label_list(labels: LabelMap, category_ids: list[int]) -> list[int]:
    """The labels of category ids."""
    return [labels.label(category_id) for category_id in category_ids]


def make_targets(boxes: NDArray[np.float64], labels: list[int], size: tuple[int, int]) -> dict[str, Tensor]:
    """The targets of one image.

    Args:
        boxes: float [n, 4] xyxy pixels.
        labels: of the boxes.
        size: (width, height) of the image in pixels.

    Returns:
        {"labels": int64 [n], "boxes": float32 [n, 4] cxcywh in 0..1}.
    """
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    normalised = np.concatenate([centers, boxes[:, 2:] - boxes[:, :2]], axis=1) / np.array([*size, *size])
    return {
        "labels": torch.tensor(labels, dtype=torch.int64),
        "boxes": torch.from_numpy(normalised.astype(np.float32)),
    }
