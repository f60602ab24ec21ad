"""What an exported detector costs and whether it is as good: size, time of an image on the CPU, and AP.

    python tests/benchmarks/export.py [--threads 2] [--repeats 3] [--epochs 2]

`coco_r50` with initial weights, one image of 800 x 1066: the network in torch with the compiled operator, the ONNX
model in onnxruntime, and the program of torch.export. Then the demo is trained for a few epochs, and its validation
split is scored with the detector and with its ONNX model, which takes images of any size.
"""

import argparse
import json
import subprocess
import sys
import tempfile
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
from pipeline.predict.export import NAMES, export_detector
from pipeline.run_folder import METRICS_FILE

PROJECT = Path(__file__).resolve().parents[2]
DEMO, COCO = (PROJECT / "jobs" / "configs" / name for name in ("demo.yaml", "coco_r50.yaml"))
SIZE = (800, 1066)
MOST_AP = 0.001
"""Most that the AP of the ONNX model may differ."""


def session_of(file: Path, threads: int) -> onnxruntime.InferenceSession:
    """The ONNX model in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def time_r50(folder: Path, threads: int, repeats: int) -> None:
    """Print size and time of the published configuration."""
    config = load_config(COCO, ())
    labels = LabelMap("coco91", tuple(Category(number, f"{number}") for number in range(1, 91)))
    architecture = config.model_for(labels.num_classes)
    model = build_model(architecture, torch.Generator().manual_seed(0))
    detector = Detector(model, architecture, labels, config.evaluate)
    for kind, name in (("onnx", "r50.onnx"), ("torch", "r50.pt2")):
        print(f"{kind}: {export_detector(detector, folder / name, kind, SIZE)}", flush=True)  # type: ignore[arg-type]
    images = torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8)
    batch = PixelBatch(images, torch.zeros(1, *SIZE, dtype=torch.bool)).to("cpu")
    session = session_of(folder / "r50.onnx", threads)
    program = torch.export.load(folder / "r50.pt2").module()
    calls = [
        lambda: detector.results(batch, torch.tensor([SIZE]), 100),
        lambda: session.run(NAMES, {"images": images.numpy()}),
        torch.no_grad()(lambda: program(images)),
    ]
    files = [0, *((folder / name).stat().st_size for name in ("r50.onnx", "r50.pt2"))]
    for what, size, took in zip(("torch", "onnxruntime", "torch.export"), files, seconds(calls, repeats), strict=True):
        print(f"{what:14} {took:6.2f} s an image of {SIZE[0]} x {SIZE[1]}   {size / 1e6:6.1f} MB", flush=True)


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
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        time_r50(folder, options.threads, options.repeats)
        own, other = score_demo(folder, options.threads, options.epochs)
    print(f"demo after {options.epochs} epochs: AP {own:.4f} in torch, {other:.4f} in onnxruntime")
    return 1 if abs(own - other) > MOST_AP else 0


if __name__ == "__main__":
    raise SystemExit(main())
