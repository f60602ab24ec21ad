"""Ground truth and detections."""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from pycocotools import mask as masks

from pipeline.evaluate.documents import IouType

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


HEIGHT, WIDTH = 40, 50
SIDES = st.sampled_from([0, 1, 8, 31, 32, 33, 95, 96, 97, 200]) | st.floats(0, 120, width=32)
"""Sides of boxes: those of the areas between sizes of objects (32 x 32, 96 x 96) and beside them, and none."""
SCORES = st.sampled_from([0.0, 0.3, 0.5, 0.5000001, 1.0]) | st.floats(-2, 2, width=16)


@st.composite
def scenes(draw: st.DrawFn, iou_type: IouType) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Whatever may be scored: images without objects or detections, crowds, ties, more detections than count."""
    images = [{"id": number, "width": WIDTH, "height": HEIGHT} for number in range(1, draw(st.integers(1, 4)) + 1)]
    categories = [{"id": number, "name": f"kind {number}"} for number in range(1, draw(st.integers(1, 3)) + 1)]
    document: dict[str, Any] = {"images": images, "categories": categories, "annotations": []}
    detections: list[dict[str, Any]] = []

    def place() -> dict[str, Any]:
        return {
            "image_id": draw(st.integers(1, len(images))),
            "category_id": draw(st.integers(1, len(categories))),
        }

    for number in range(1, draw(st.integers(0, 8)) + 1):
        box = _box(draw)
        area = draw(st.sampled_from([box[2] * box[3], 0.0, 32.0**2, 96.0**2, 32.0**2 + 1e-9]))
        annotation = {"id": number, **place(), "bbox": box, "area": area, "iscrowd": int(draw(st.integers(0, 4)) == 0)}
        annotation |= _shape(draw, iou_type, box)
        if iou_type == "keypoints":
            annotation["num_keypoints"] = sum(value > 0 for value in annotation["keypoints"][2::3])
        document["annotations"].append(annotation)
    for _ in range(draw(st.integers(0, 8))):
        like = draw(st.sampled_from(document["annotations"])) if document["annotations"] else None
        if like is not None and draw(st.integers(0, 3)):
            shift, growth = draw(st.sampled_from([0.0, 1.0, 2.5])), draw(st.sampled_from([1.0, 0.5, 0.75, 0.95]))
            x, y, width, height = like["bbox"]
            box, where = [x + shift, y, width * growth, height], {key: like[key] for key in ("image_id", "category_id")}
        else:
            box, where = _box(draw), place()
        detection = {**where, "score": draw(SCORES), **_shape(draw, iou_type, box, compressed=True)}
        times = draw(st.sampled_from([1, 1, 1, 2, 12, 21, 101]))  # the most that count are 1, 10, 20 and 100
        detections += [{**detection, "score": detection["score"] - step * draw(st.sampled_from([0, 0.001]))}
                       for step in range(times)]  # fmt: skip
    return document, detections


def _box(draw: st.DrawFn) -> list[float]:
    corner = st.integers(-5, 40) | st.floats(-5, 40, width=32)
    return [float(value) for value in (draw(corner), draw(corner), draw(SIDES), draw(SIDES))]


def _shape(draw: st.DrawFn, iou_type: IouType, box: list[float], *, compressed: bool = False) -> dict[str, Any]:
    x, y, width, height = box
    if iou_type == "bbox":
        return {"bbox": box}
    if iou_type == "keypoints":
        points = np.random.default_rng(draw(st.integers(0, 99))).random((17, 3)) * (width, height, 3) + (x, y, 0)
        points[:, 2] = np.floor(points[:, 2]) * draw(st.sampled_from([1, 1, 0]))
        return {"keypoints": points.ravel().tolist()}
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    pixels[max(0, int(y)) : max(0, int(y + height)), max(0, int(x)) : max(0, int(x + width))] = 1
    run_lengths = masks.encode(pixels)
    kind = "compressed" if compressed else draw(st.sampled_from(["compressed", "plain", "polygons"]))
    if kind == "polygons":
        return {"segmentation": [[x, y, x + width, y, x + width, y + height, x, y + height]]}
    if kind == "compressed":
        return {"segmentation": {"size": [HEIGHT, WIDTH], "counts": run_lengths["counts"].decode()}}
    flat = pixels.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=0, append=2))
    counts = np.diff(edges, prepend=0).tolist()
    return {"segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}}
