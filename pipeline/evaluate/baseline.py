"""What a detector scores that sees nothing: one constant box a category for every image, the mean of its objects."""

from collections import defaultdict
from typing import Any

import numpy as np

from pipeline.evaluate.detect import Detection


def constant_boxes(truth: dict[str, Any]) -> list[Detection]:
    """A detection a category and image: the category's mean box, scored by the share of the images that have one.

    Args:
        truth: a COCO document, as `pipeline.data.truth.ground_truth` gives it. Crowds are left out.

    Returns:
        Entries of COCO's result format; means are of centres and sides, as shares of the image.
    """
    sizes = {image["id"]: np.array([image["width"], image["height"]]) for image in truth["images"]}
    boxes, seen = defaultdict(list), defaultdict(set)
    for annotation in truth["annotations"]:
        if not annotation["iscrowd"]:
            corner, sides = np.array(annotation["bbox"]).reshape(2, 2)
            size = sizes[annotation["image_id"]]
            boxes[annotation["category_id"]].append(np.concatenate([(corner + sides / 2) / size, sides / size]))
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
