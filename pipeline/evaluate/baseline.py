"""How a detector compares with one that sees nothing: a constant box for every image, and boxes that hardly vary."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluate.detect import Detection

FEW_IMAGES = 8
"""Fewer of them tell nothing of how boxes vary."""


def box_variety(truth: dict[str, Any], detections: list[Detection]) -> float | None:
    """How much the best boxes of the images vary, as a share of how much the objects' boxes do.

    Args:
        truth: as of `constant_boxes`.
        detections: entries of COCO's result format.

    Returns:
        The ratio of the standard deviations of centres and sides, as shares of the image, on average; None where there
        are too few boxes, or all objects lie alike.
    """
    sizes = _sizes(truth)
    best: dict[Any, Detection] = {}
    for found in detections:
        if found["image_id"] not in best or found["score"] > best[found["image_id"]]["score"]:
            best[found["image_id"]] = found
    objects = [each for each in truth["annotations"] if not each["iscrowd"]]
    if min(len(best), len(objects)) < FEW_IMAGES:
        return None
    found, wanted = (
        np.mean(np.std([_shares(each["bbox"], sizes[each["image_id"]]) for each in boxes], axis=0))
        for boxes in (list(best.values()), objects)
    )
    return float(found / wanted) if wanted > 1e-6 else None


def _sizes(truth: dict[str, Any]) -> dict[Any, NDArray[np.float64]]:
    return {image["id"]: np.array([image["width"], image["height"]], dtype=np.float64) for image in truth["images"]}


def _shares(box: Sequence[float], size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centre and sides `[4]` of an xywh box, as shares of its image."""
    corner, sides = np.array(box).reshape(2, 2)
    return np.concatenate([(corner + sides / 2) / size, sides / size])


def constant_boxes(truth: dict[str, Any]) -> list[Detection]:
    """A detection a category and image: the category's mean box, scored by the share of the images that have one.

    Args:
        truth: a COCO document, as `pipeline.data.truth.ground_truth` gives it. Crowds are left out.

    Returns:
        Entries of COCO's result format; means are of centres and sides, as shares of the image.
    """
    sizes = _sizes(truth)
    boxes, seen = defaultdict(list), defaultdict(set)
    for annotation in truth["annotations"]:
        if not annotation["iscrowd"]:
            boxes[annotation["category_id"]].append(_shares(annotation["bbox"], sizes[annotation["image_id"]]))
            seen[annotation["category_id"]].add(annotation["image_id"])
    means = {category: np.mean(shares, axis=0) for category, shares in boxes.items()}
    return [
        {
            "image_id": image,
            "category_id": category,
            "bbox": [*((mean[:2] - mean[2:] / 2) * size).tolist(), *(mean[2:] * size).tolist()],
            "score": len(seen[category]) / len(sizes),
        }
        for image, size in sizes.items()
        for category, mean in means.items()
    ]
