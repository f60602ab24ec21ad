"""Evaluations to report on: every type of error once or twice, and names that are markup."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.load import dump_config, parse_config
from pipeline.data.manifest import Manifest
from pipeline.data.truth import ground_truth
from pipeline.evaluate.evaluated import RECORD_FILE
from pipeline.evaluate.results import DETECTIONS_FILE
from pipeline.evaluate.score import score
from pipeline.files import write_json
from pipeline.run_folder import METRICS_FILE
from tests.builders import make_annotation, make_manifest

CAT, DOG, BRUSH = 1, 3, 90

HOSTILE = "</script><script>document.title = 'taken'</script>\"'><img src=x onerror=alert(1)> & <b>cat</b>"
"""A category's name that a page must show as it is."""

OBJECTS = (
    make_annotation(1, 1, (0, 0, 20, 20), CAT),
    make_annotation(2, 2, (0, 0, 20, 20), CAT),
    make_annotation(3, 3, (0, 0, 20, 20), DOG),
    make_annotation(4, 4, (0, 0, 20, 20), DOG),
    make_annotation(5, 5, (0, 0, 20, 20), DOG),
    make_annotation(6, 1, (22, 0, 8, 20), DOG, iscrowd=1),
)


def make_detection(image_id: int, category_id: int, left: float, score: float) -> dict[str, Any]:
    """A box of 20 x 20 pixels at the top of an image; moved by 10 it overlaps the object there by a third."""
    return {"image_id": image_id, "category_id": category_id, "bbox": [left, 0, 20, 20], "score": score}


FOUND = (
    make_detection(1, CAT, 0, 0.9),  # right
    make_detection(1, CAT, 0, 0.8),  # a duplicate
    make_detection(2, DOG, 0, 0.95),  # a wrong category
    make_detection(3, DOG, 10, 0.7),  # placed badly
    make_detection(4, CAT, 10, 0.6),  # both
    make_detection(6, CAT, 0, 0.85),  # nothing is there
)
"""Image 5 has an object that is missed, and image 7 neither objects nor detections."""
PERFECT = tuple(
    make_detection(entry["image_id"], entry["category_id"], 0, 0.9) for entry in OBJECTS if not entry["iscrowd"]
)


def make_split(root: Path) -> Manifest:
    """Seven images of 32 x 24 pixels with the objects."""
    return make_manifest(root, range(1, 8), OBJECTS, split="val")


def write_evaluation(
    folder: Path, manifest: Manifest, detections: Sequence[dict[str, Any]] = FOUND, *, name: str = "run", step: int = 10
) -> Path:
    """What `raydetr evaluate` leaves of a checkpoint, but for the page, the pictures and the tables."""
    metrics = score(ground_truth(manifest), list(detections))
    inputs = {"weights": "0" * 64, "val_digest": manifest.digest, "settings": {}}
    made = {"step": step, "checkpoint": f"checkpoint-{step}", "inputs": inputs, "verified": True}
    for place in (folder, folder / f"checkpoint-{step}"):
        write_json(place / METRICS_FILE, {**made, **metrics})
        write_json(place / DETECTIONS_FILE, list(detections))
    config = dump_config(parse_config({"name": name}, "test"))
    code = {"version": "0.1.0", "git_commit": "c0ffee", "git_dirty": "false"}
    write_json(folder / RECORD_FILE, {"key": "", "config": config, "code": code, "val": str(manifest.folder)})
    return folder
