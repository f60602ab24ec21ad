"""Can the whole pipeline learn 8 real COCO images by heart? Prints AP50 on them and the minutes it took.

python tests/benchmarks/overfit.py --data ../shared/data/tiny_coco
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
IMAGES = 8
SETTINGS = {
    "name": "overfit",
    "dataset.labels": "contiguous",
    "model.num_queries": 60,
    "train.epochs": 200,
    "train.global_batch": 4,
    "train.micro_batch": 2,
    "train.checkpoint_epochs": 100,
    "train.augment": "{flip: 0, crop: 0, short_sides: [224], max_side: 320}",
    "evaluate": "{batch_size: 4, short_side: 224, max_side: 320}",
    "register.model_name": "overfit",
}


def write_subset(annotations: Path, out: Path) -> None:
    """The first images of a COCO file that have an object, with their annotations and categories."""
    document = json.loads(annotations.read_text(encoding="utf-8"))
    used = {annotation["image_id"] for annotation in document["annotations"] if not annotation.get("iscrowd")}
    images = [image for image in document["images"] if image["id"] in used][:IMAGES]
    ids = {image["id"] for image in images}
    kept = [annotation for annotation in document["annotations"] if annotation["image_id"] in ids]
    out.write_text(json.dumps({"images": images, "annotations": kept, "categories": document["categories"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/tiny_coco"), help="folder of tiny_coco")
    parser.add_argument("--epochs", type=int, default=SETTINGS["train.epochs"], help="passes over the 8 images")
    options = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        subset = Path(folder) / "subset.json"
        write_subset(options.data / "annotations" / "instances_train2017.json", subset)
        split = f"{{annotations: {subset}, images: {(options.data / 'train2017').resolve()}}}"
        settings = {
            **SETTINGS,
            "runs": folder,
            "dataset.root": options.data.resolve(),
            "dataset.train": split,
            "dataset.val": split,
            "train.epochs": options.epochs,
            "train.lr_drop_epochs": f"[{options.epochs * 5 // 6}]",
        }
        arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        command = [sys.executable, "-m", "jobs", "run", "-c", "jobs/configs/tiny_coco.yaml", *arguments]
        subprocess.run(command, cwd=PROJECT, check=True)
        metrics = json.loads((Path(folder) / "overfit" / "evaluate" / "metrics.json").read_text())
    minutes = (time.perf_counter() - begun) / 60
    print(
        f"overfit {IMAGES} images: AP {metrics['AP']:.3f}  AP50 {metrics['AP50']:.3f}  in {minutes:.1f} minutes on"
        f" {os.cpu_count()} CPUs, sharding and evaluation included"
    )


if __name__ == "__main__":
    main()
