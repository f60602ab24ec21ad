"""What an exported detector costs and whether it is as good: size, time of an image on the CPU, and AP.

    python tests/benchmarks/export.py [--threads 2] [--repeats 3] [--epochs 2] [--size 800x1066]

Each variant of the family with a ResNet-50 and initial weights, one image: the network in torch with the
compiled operator, the ONNX model in onnxruntime, and of `coco_r50` also the program of torch.export. Then the demo is
trained for a few epochs, and its validation split is scored with the detector and with its ONNX model, which takes
images of any size.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from common import seconds

from model.batch import PixelBatch
from model.build import build_model
from pipeline.checkpoint.state import latest
from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.data.labels import Category, LabelMap
from pipeline.data.loader import EvalLoader
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.data.truth import ground_truth
from pipeline.evaluate.score import score
from pipeline.predict.detector import Detector
from pipeline.predict.export import NAMES, SUFFIXES, Kind, export_detector
from pipeline.run_folder import METRICS_FILE

PROJECT = Path(__file__).resolve().parents[2]
CONFIGS = PROJECT / "jobs" / "configs"
DEMO = CONFIGS / "demo.yaml"
VARIANTS: dict[str, tuple[str, tuple[Kind, ...]]] = {
    "single-scale": ("coco_r50_single_scale", ("onnx",)),
    "multi-scale": ("coco_r50", ("onnx", "torch")),
    "refined": ("coco_r50_refine", ("onnx",)),
    "two-stage": ("coco_r50_two_stage", ("onnx",)),
    "DETR": ("coco_r50_detr", ("onnx",)),
}
"""Configuration of each, and what it is exported to."""
MOST_AP = 0.001
"""Most that the AP of the ONNX model may differ."""


def session_of(file: Path, threads: int) -> onnxruntime.InferenceSession:
    """The ONNX model in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def initial(config: Config) -> Detector:
    """The detector of a configuration before it is trained."""
    labels = LabelMap("coco91", tuple(Category(number, f"{number}") for number in range(1, 91)))
    architecture = config.model_for(labels.num_classes)
    model = build_model(architecture, torch.Generator().manual_seed(0))
    return Detector(model, architecture, labels, config.evaluate)


def time_variant(name: str, folder: Path, size: tuple[int, int], threads: int, repeats: int) -> None:
    """Print a variant's lines of the table."""
    config, kinds = VARIANTS[name]
    detector = initial(load_config(CONFIGS / f"{config}.yaml", ()))
    images = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    batch = PixelBatch(images, torch.zeros(1, *size, dtype=torch.bool)).to("cpu")
    files = [folder / f"{config}{SUFFIXES[kind]}" for kind in kinds]
    exported = [export_detector(detector, file, kind, size) for file, kind in zip(files, kinds, strict=True)]
    calls: list[Callable[[], object]] = [lambda: detector.results(batch, torch.tensor([size]), 100)]
    calls += [runner_of(file, kind, images, threads) for file, kind in zip(files, kinds, strict=True)]
    own, *others = seconds(calls, repeats)
    for file, kind, took, apart in zip(files, kinds, others, exported, strict=True):
        megabytes = file.stat().st_size / 1e6
        figures = f"{megabytes:6.1f} {own:7.2f} {took:7.2f} {took / own:6.2f} {apart.boxes:9.0e} {apart.scores:9.0e}"
        print(f"{name:14} {kind:6} {figures}", flush=True)
        file.unlink()


def runner_of(file: Path, kind: Kind, images: torch.Tensor, threads: int) -> Callable[[], object]:
    """What runs an exported file on images."""
    if kind == "onnx":
        session = session_of(file, threads)
        return lambda: session.run(NAMES, {"images": images.numpy()})
    program = torch.export.load(file).module()
    return torch.no_grad()(lambda: program(images))


def run_demo(folder: Path, epochs: int) -> Config:
    """The demo's pipeline below a folder, trained for some epochs."""
    settings = {"runs": folder, "dataset.root": folder / "shapes", "train.epochs": epochs, "train.lr_drop_epochs": "[]"}
    overrides = [f"{key}={value}" for key, value in (settings | {"evaluate.curve": "false"}).items()]
    words = [word for override in overrides for word in ("--set", override)]
    subprocess.run([sys.executable, "-m", "jobs", "run", "-c", DEMO, *words], cwd=PROJECT, check=True)
    return load_config(DEMO, overrides)


def onnx_detections(session: onnxruntime.InferenceSession, manifest: Manifest, config: Config) -> list[dict[str, Any]]:
    """What an ONNX model finds in a split, in COCO's result format."""
    found = []
    batches = [[index] for index in range(len(manifest.samples))]
    for pixels, image_ids, sizes in EvalLoader(manifest, batches, config.evaluate, 0, "fail"):
        boxes, scores, labels = session.run(NAMES, {"images": pixels.pixels.numpy()})
        scale = (sizes[0].flip(0) / torch.tensor(pixels.pixels.shape[:1:-1])).repeat(2).tolist()
        for box, score_, label in zip(boxes[0].tolist(), scores[0].tolist(), labels[0].tolist(), strict=True):
            left, top, right, bottom = (side * by for side, by in zip(box, scale, strict=True))
            entry = {"image_id": int(image_ids[0]), "category_id": label, "score": score_}
            found.append({**entry, "bbox": [left, top, right - left, bottom - top]})
    return found


def score_demo(folder: Path, threads: int, epochs: int) -> tuple[float, float]:
    """AP of the demo's detector, and of its ONNX model."""
    config = run_demo(folder, epochs)
    checkpoint = latest(config.folder.checkpoints)
    assert checkpoint is not None, "it was trained"
    detector = Detector.from_checkpoint(checkpoint, config.evaluate)
    print(f"demo: {export_detector(detector, folder / 'demo.onnx', 'onnx', None)}")
    manifest = read_manifest(config.shards_folder / "val")
    found = onnx_detections(session_of(folder / "demo.onnx", threads), manifest, config)
    own = json.loads((config.folder.evaluation / METRICS_FILE).read_text())["AP"]
    return own, score(ground_truth(manifest), found)["AP"]


def main() -> int:
    """Print the figures; the exit code is 1 if the AP differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--size", default="800x1066", help="height and width of the image")
    options = parser.parse_args()
    height, width = map(int, options.size.split("x"))
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print(f"one image of {options.size}, {options.threads} threads; differences of boxes, scores")
        print(f"{'':21} {'MB':>6} {'torch s':>7} {'file s':>7} {'ratio':>6} {'boxes':>9} {'scores':>9}", flush=True)
        for name in VARIANTS:
            time_variant(name, folder, (height, width), options.threads, options.repeats)
        own, other = score_demo(folder, options.threads, options.epochs)
    print(f"demo after {options.epochs} epochs: AP {own:.4f} in torch, {other:.4f} in onnxruntime")
    return 1 if abs(own - other) > MOST_AP else 0


if __name__ == "__main__":
    raise SystemExit(main())
