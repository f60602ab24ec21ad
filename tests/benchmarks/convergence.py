"""How fast each architecture learns the drawn shapes: AP against training steps, on one budget for all.

    python tests/benchmarks/convergence.py [--steps 3600] [--images 1200] [--models detr multi_scale ...]

Backbone (resnet_tiny from scratch), width, layers, queries, images, batch, steps and augmentation are the demo's for
every row; each architecture has its own published losses. DETR is tried at its published learning rate, at half of the
demo's (as its published rate is half of Deformable DETR's), and with a last stage of twice the resolution (DC5); the
best of the three counts. Measured are AP, AP50, APs (objects of less than 32 x 32 px) and APm (larger ones; the shapes
are too small for COCO's APl) on held-out images, and the step at which AP50 reaches 0.5, interpolated between
checkpoints.

What is done is kept in --out: given again, the same command goes on from where it was stopped. Two commands, each with
one thread and half of the models, take less time than one with two.
"""

import argparse
import math
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.checkpoint.state import checkpoints
from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.data.manifest import Manifest
from pipeline.distributed import World, close, init_world
from pipeline.evaluate.detect import detect
from pipeline.evaluate.results import evaluate_checkpoint
from pipeline.log import set_up_logging
from pipeline.shard.coco import open_source
from pipeline.shard.synthetic import draw_dataset
from pipeline.shard.write import shard_split
from pipeline.tracking.spool import SpoolReader
from pipeline.train.loop import train
from pipeline.train.run import TrainJob

DEMO = Path(__file__).resolve().parents[2] / "jobs" / "configs" / "demo.yaml"
POINTS = 8
"""Checkpoints that are scored."""
DROP = 0.75
"""Part of the steps after which the learning rate drops, as in the demo."""
WANTED_AP50 = 0.5
LEARNT = 0.005
"""Average precision below which a network has learnt nothing yet."""
COLUMNS = ("AP", "AP50", "APs", "APm")

ONE_STAGE = {"model.with_box_refine": False, "model.two_stage": False}
DETR = {
    **ONE_STAGE,
    "model.arch": "detr",
    "model.feature_levels": 1,
    "model.class_loss": "softmax",
    "train.criterion": "{class_weight: 1, no_object_weight: 0.1}",
}
PUBLISHED_RATE = {"train.lr": 1e-4, "train.lr_backbone": 1e-4}
HALF_RATE = {"train.lr": 2.5e-4, "train.lr_backbone": 2.5e-4}
MODELS: dict[str, dict[str, Any]] = {
    "detr": {**DETR, **PUBLISHED_RATE},
    "detr_half_rate": {**DETR, **HALF_RATE},
    "detr_dc5": {**DETR, **PUBLISHED_RATE, "model.dilation": True},
    "single_scale": {**ONE_STAGE, "model.feature_levels": 1},
    "multi_scale": ONE_STAGE,
    "refine": {"model.two_stage": False},
    "two_stage": {},
}
"""What differs from the demo, which is `two_stage`."""
TITLES = {
    "detr": "DETR",
    "detr_half_rate": "DETR, half the demo's rate",
    "detr_dc5": "DETR-DC5",
    "single_scale": "Deformable DETR, one scale",
    "multi_scale": "Deformable DETR",
    "refine": "+ box refinement",
    "two_stage": "++ two-stage",
}
Curve = list[dict[str, float]]
"""Metrics of the scored checkpoints with their `step`, oldest first."""


def make_config(name: str, changes: dict[str, Any], options: argparse.Namespace) -> Config:
    """The demo's pipeline with other settings and the budget of the command line."""
    budget = f"{options.steps}x{options.batch}-of-{options.images}-scored-on-{options.held_out}"
    epochs = options.steps * options.batch / options.images
    settings = {
        "name": name,
        "runs": options.out / budget,
        "dataset.root": options.out / budget / "shapes",
        "dataset.synthetic.train_images": options.images,
        "dataset.synthetic.val_images": options.held_out,
        "train.global_batch": options.batch,
        "train.micro_batch": options.batch,
        "train.epochs": math.ceil(epochs),
        "train.max_steps": options.steps,
        "train.lr_drop_epochs": [DROP * epochs],
        "train.checkpoint_epochs": epochs / POINTS,
        "cluster.workers": 1,
        **changes,
    }
    return load_config(DEMO, [f"{key}={value}" for key, value in settings.items()])


def make_shards(config: Config) -> dict[str, Manifest]:
    """Draw the images and shard both splits, unless they are there."""
    assert config.dataset.synthetic is not None, "the demo draws its images"
    root = draw_dataset(Path(config.dataset.root), config.dataset.synthetic)
    manifests = {}
    for name, split in (("train", config.dataset.train), ("val", config.dataset.val)):
        source = open_source(root / split.annotations, root / split.images)
        manifests[name] = shard_split(source, name, config.shards_folder, config.dataset, config.shards)
    return manifests


def learn(config: Config, world: World) -> Curve:
    """Train one architecture to the end of its budget and score its checkpoints, as far as that is not done."""
    manifests = make_shards(config)
    model = config.model_for(manifests["train"].labels.num_classes)
    job = TrainJob(model, config.train, manifests["train"].folder, config.folder)
    train(job, world)
    curve = []
    for path in checkpoints(job.out.checkpoints):
        metrics, _ = evaluate_checkpoint(
            path,
            manifests["val"],
            config.evaluate,
            config.folder.evaluation / path.name,
            lambda path, batches: [detect(path, manifests["val"], batches, config.evaluate, world.device)],
        )
        curve.append({key: metrics[key] for key in ("step", *COLUMNS)})
    return curve


def images_per_second(config: Config) -> float:
    """Median over the points of the training curve, so that pauses do not count."""
    records = SpoolReader(config.folder.train_spool).read()
    return median(record.metrics["train/images_per_second"] for record in records)


def steps_to(wanted: float, curve: Curve) -> float | None:
    """Step at which AP50 first reaches a value, on straight lines between the checkpoints; None where it does not."""
    before = {"step": 0.0, "AP50": 0.0}
    for point in curve:
        if point["AP50"] >= wanted:
            part = (wanted - before["AP50"]) / (point["AP50"] - before["AP50"])
            return before["step"] + part * (point["step"] - before["step"])
        before = point
    return None


def plot(curves: dict[str, Curve], path: Path) -> None:
    """AP50, and AP on small objects, against steps."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, metric in zip(figure.subplots(1, 2, sharey=True), ("AP50", "APs"), strict=True):
        for model, curve in curves.items():
            steps, values = [0.0, *(p["step"] for p in curve)], [0.0, *(p[metric] for p in curve)]
            style = "--" if model.startswith("detr") else "-"
            axes.plot(steps, values, marker=".", linestyle=style, label=TITLES[model])
        axes.set_xlabel("steps")
        axes.set_title(metric)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def claims(curves: dict[str, Curve]) -> dict[str, bool]:
    """What the paper says, by whether it shows in the last checkpoints; without DETR's and ours there is nothing.

    That small objects gain most can be said only where DETR has learnt something: at the least `LEARNT`.
    """
    last = {model: curve[-1] for model, curve in curves.items()}
    detrs = [point for model, point in last.items() if model.startswith("detr")]
    if not detrs or "multi_scale" not in last:
        return {}
    detr, ours = max(detrs, key=lambda point: point["AP"]), last["multi_scale"]
    wide = ours["AP"] >= max(1.5 * detr["AP"], LEARNT)
    shown = {f"Deformable DETR's AP {ours['AP']:.3f} is at least 1.5 times DETR's {detr['AP']:.3f}": wide}
    if min(detr[metric] for metric in COLUMNS) >= LEARNT:
        gain = {metric: ours[metric] / detr[metric] for metric in COLUMNS}
        claim = f"its APs is {gain['APs']:.1f} times DETR's, its APm {gain['APm']:.1f} times: small objects gain most"
        shown[claim] = gain["APs"] > gain["APm"]
    else:
        shown[f"what small objects gain cannot be said where DETR's AP is below {LEARNT}: raise --steps"] = False
    return shown


def main() -> int:
    """Print the table; the exit code is 1 if a claim does not show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3600, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help="images of a step")
    parser.add_argument("--images", type=int, default=1200, help="training images")
    parser.add_argument("--held-out", type=int, default=250, help="images that are scored")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL",
                        help=f"of {', '.join(MODELS)}; all by default")  # fmt: skip
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads")
    parser.add_argument("--out", type=Path, default=Path("runs/convergence"), help="folder of the runs and the plot")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    set_up_logging()
    begun = time.perf_counter()
    print(f"{'after ' + str(options.steps) + ' steps':28}" + "".join(f"{name:>8}" for name in COLUMNS)
          + f"{'steps to AP50 ' + str(WANTED_AP50):>21}{'images/s':>10}", flush=True)  # fmt: skip
    curves: dict[str, Curve] = {}
    world = init_world("cpu")
    try:
        for model in options.models:
            config = make_config(model, MODELS[model], options)
            curve = curves[model] = learn(config, world)
            reached = steps_to(WANTED_AP50, curve)
            print(f"{TITLES[model]:28}" + "".join(f"{curve[-1][name]:8.3f}" for name in COLUMNS)
                  + f"{'not reached' if reached is None else round(reached):>21}{images_per_second(config):10.1f}",
                  flush=True)  # fmt: skip
    finally:
        close(world)
    path = options.out / "convergence.png"
    plot(curves, path)
    shown = claims(curves)
    for claim, shows in shown.items():
        print(f"{'yes' if shows else 'NO':3}  {claim}")
    print(f"{path}; {(time.perf_counter() - begun) / 60:.1f} minutes")
    return 0 if all(shown.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
