"""What the score of 5,000 images costs, beside pycocotools'.

    python tests/benchmarks/evaluation.py

100 detections an image, 80 categories, 36,000 objects, as on COCO's validation split. Each scorer is a process of its
own that reads the two files; fails where ours takes a tenth of the time or a quarter of the memory, or another number.
"""

import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from pipeline.config.sections import METRICS

IMAGES, OBJECTS, FOUND_AN_IMAGE, CATEGORIES = 5_000, 36_000, 100, 80
MOST_TIME, MOST_MEMORY = 0.1, 0.25
"""Parts of pycocotools'."""


def write(folder: Path) -> None:
    generator = np.random.default_rng(0)
    images, categories = generator.integers(1, IMAGES + 1, OBJECTS), generator.integers(1, CATEGORIES + 1, OBJECTS)
    boxes = np.column_stack((generator.uniform(0, 400, (OBJECTS, 2)), np.exp(generator.uniform(2, 5.3, (OBJECTS, 2)))))
    annotations = [
        {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3],
         "iscrowd": int(number % 80 == 0)}
        for number, (image, category, box) in enumerate(
            zip(images.tolist(), categories.tolist(), boxes.round(2).tolist(), strict=True), 1)
    ]  # fmt: skip
    document = {
        "images": [{"id": number, "width": 640, "height": 480} for number in range(1, IMAGES + 1)],
        "categories": [{"id": number, "name": f"c{number}"} for number in range(1, CATEGORIES + 1)],
        "annotations": annotations,
    }
    (folder / "truth.json").write_text(json.dumps(document))
    found = []
    objects = [np.flatnonzero(images == number) for number in range(IMAGES + 1)]
    for image in range(1, IMAGES + 1):
        own = generator.choice(objects[image], FOUND_AN_IMAGE) if len(objects[image]) else np.zeros(0, np.int64)
        moved = boxes[own] + generator.normal(0, 0.1, (len(own), 4)) * boxes[own][:, [2, 3, 2, 3]]
        guesses = np.where(generator.random(len(own)) < 0.4, categories[own], generator.integers(1, 81, len(own)))
        scores = generator.random(len(own)).round(4)
        columns = (guesses.tolist(), np.abs(moved).round(2).tolist(), scores.tolist())
        found += [
            {"image_id": image, "category_id": category, "bbox": box, "score": score}
            for category, box, score in zip(*columns, strict=True)
        ]
    (folder / "found.json").write_text(json.dumps(found))


def ours(folder: Path) -> list[float]:
    from pipeline.evaluate.score import score

    metrics = score(folder / "truth.json", folder / "found.json")
    return [metrics[name] for name in METRICS]


def pycocotools(folder: Path) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(folder / "truth.json")
    evaluation = COCOeval(truth, truth.loadRes(str(folder / "found.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def measure(scorer: Callable[[Path], list[float]], folder: Path, answer: Connection) -> None:
    import pipeline.evaluate.score  # noqa: F401  what is imported is not timed, but counts as memory of both

    begin = time.perf_counter()
    numbers = scorer(folder)
    answer.send((numbers, time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))


def in_a_process(scorer: Callable[[Path], list[float]], folder: Path) -> tuple[list[float], float, float]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(scorer, folder, there))
    process.start()
    numbers, seconds, memory = here.recv()
    process.join()
    return numbers, seconds, memory


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        numbers, seconds, memory = in_a_process(ours, folder)
        expected, their_seconds, their_memory = in_a_process(pycocotools, folder)
    print(f"{IMAGES:,} images of {FOUND_AN_IMAGE} detections, {CATEGORIES} categories, {OBJECTS:,} objects")
    print(f"pycocotools  {their_seconds:6.2f} s  {their_memory:5.2f} GiB")
    print(f"ours         {seconds:6.2f} s  {memory:5.2f} GiB")
    time_ratio, memory_ratio = seconds / their_seconds, memory / their_memory
    print(f"time {time_ratio:.3f} of it, memory {memory_ratio:.2f}; the same numbers: {numbers == expected}")
    if numbers != expected or time_ratio > MOST_TIME or memory_ratio > MOST_MEMORY:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
