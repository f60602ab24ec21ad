"""What it costs to plan the shards of a COCO file of 1 million images and 10 million boxes.

    python tests/benchmarks/planning.py

The file (1.1 GB) is generated, the images are empty files: a plan needs their sizes, not their content.
"""

import multiprocessing
import resource
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from pipeline.shard.coco import clean, open_source
from pipeline.shard.write import plan_shards

IMAGES, BOXES_AN_IMAGE, CATEGORIES = 1_000_000, 10, 80
MOST_SECONDS, MOST_GIB = 300, 6.0


def write(folder: Path) -> None:
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    with (folder / "annotations.json").open("w") as file:
        categories = ",".join(f'{{"id":{number},"name":"c{number}"}}' for number in range(1, CATEGORIES + 1))
        file.write(f'{{"categories":[{categories}],"images":[')
        for number in range(1, IMAGES + 1):
            name = f"{number:012d}.jpg"
            (folder / "images" / name).touch()
            comma = "," if number > 1 else ""
            file.write(f'{comma}{{"id":{number},"file_name":"{name}","width":640,"height":480}}')
        file.write('],"annotations":[')
        for number in range(1, IMAGES + 1):
            values = generator.integers((0, 0, 5, 5, 1), (430, 270, 200, 200, CATEGORIES + 1), (BOXES_AN_IMAGE, 5))
            for own, (x, y, width, height, category) in enumerate(values.tolist(), (number - 1) * BOXES_AN_IMAGE + 1):
                comma = "," if own > 1 else ""
                file.write(
                    f'{comma}{{"id":{own},"image_id":{number},"category_id":{category},"iscrowd":0,'
                    f'"bbox":[{x}.25,{y}.5,{width},{height}],"area":{width * height}}}'
                )
        file.write("]}")


def plan(folder: Path, answer: Connection) -> None:
    begin = time.perf_counter()
    source = open_source(folder / "annotations.json", folder / "images")
    plans = plan_shards(clean(source, "fail", segmentations=False), 1000, 256 * 2**20)
    seconds, peak = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    answer.send((len(plans), seconds, peak))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=plan, args=(Path(folder), theirs))
        process.start()
        shards, seconds, peak = ours.recv()
        process.join()
    print(f"{IMAGES:,} images, {IMAGES * BOXES_AN_IMAGE:,} boxes: {shards} shards in {seconds:.0f} s, {peak:.1f} GiB")
    if seconds > MOST_SECONDS or peak > MOST_GIB:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
