"""Ground truth and detections."""

from typing import Any

import numpy as np

EMPTY: dict[str, Any] = {"images": [{"id": 1, "width": 64, "height": 64}], "categories": [{"id": 3, "name": "cat"}]}


def make_scene(seed: int, images: int = 12) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Random ground truth of all sizes with crowds and empty images, and detections near it, beside it and tied."""
    random = np.random.default_rng(seed)
    categories = [{"id": number, "name": f"kind {number}"} for number in (2, 3, 7, 90)]
    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image_id in range(1, images + 1):
        for _ in range(int(random.integers(0, 8)) if image_id % 4 else 0):
            x, y, w, h = random.uniform(0, 300), random.uniform(0, 300), *np.exp(random.uniform(1, 5.5, 2))
            category = int(random.choice([2, 3, 7]))
            truth = {"image_id": image_id, "category_id": category, "bbox": [x, y, w, h], "area": 0.8 * w * h}
            annotations.append({**truth, "id": len(annotations) + 1, "iscrowd": int(random.random() < 0.15)})
            for _ in range(int(random.integers(0, 3))):
                moved = [x + random.normal(0, 0.1 * w), y, w * random.uniform(0.8, 1.25), h]
                guess = category if random.random() < 0.8 else int(random.choice([2, 3, 7, 90]))
                value = round(float(random.random()), 1)
                detections.append({"image_id": image_id, "category_id": guess, "bbox": moved, "score": value})
    document = {
        "images": [{"id": number, "width": 640, "height": 640} for number in range(1, images + 1)],
        "annotations": annotations,
        "categories": categories,
    }
    return document, detections
