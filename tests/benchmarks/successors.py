"""What the successors' settings are worth on drawn images: AP for the same steps, and what a step of training takes.

    python tests/benchmarks/successors.py [--rows none mixed+look_twice ...] [--seeds 0 1] [--steps 1200]

Data and network are those of convergence.py's two-stage Deformable DETR, the row `none`; a row is a sum of switches.
Each alone is a row unless rows are named.
Measured are AP, AP50, and the step at which AP50 reaches 0.5, interpolated between checkpoints, each the mean over the
seeds with the least and the most behind it, and the median time of a training step. Times of rows compare only where
nothing else ran beside them.

What is done is kept in --out: given again, the same command goes on from where it was stopped.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from convergence import WANTED_AP50, images_per_second, learn, make_config, steps_to

from pipeline.distributed import close, init_world
from pipeline.log import set_up_logging

SWITCHES: dict[str, dict[str, Any]] = {
    "mixed": {"model.two_stage": "mixed"},
    "look_twice": {"model.look_forward_twice": True},
    "vfl": {"model.class_loss": "vfl", "train.criterion": "{class_weight: 1, class_cost: 2}"},
    "ia_bce": {"model.class_loss": "ia_bce", "train.criterion": "{class_weight: 1, class_cost: 2}"},
    "ma": {"model.class_loss": "ma", "train.criterion": "{class_weight: 1, class_cost: 2}"},
    "one_to_many": {"model.one_to_many": "{queries: 150, repeats: 6, weight: 1}"},
    "denoising": {"model.denoising": "{queries: 40, label_noise: 0.25, box_noise: 1}"},
    "ema": {"train.ema": 0.98},
    "jitter": {"train.augment.jitter": [0.5, 1.5], "train.augment.jitter_side": 128, "train.augment.plain_after": 6},
}
"""Settings that a row may turn on. Queries of training alone are as many beside the demo's 30 as published ones, the
average forgets as much of 1200 steps as 0.9997 of a published schedule, and jitter ends for the last quarter of them.
"""
DEFAULT = ["none", *SWITCHES, "mixed+look_twice"]


def settings_of(row: str) -> dict[str, Any]:
    """What a row sets, by key."""
    names = [] if row == "none" else row.split("+")
    if unknown := [name for name in names if name not in SWITCHES]:
        raise SystemExit(f"{row}: no switch {', '.join(unknown)}; there are none, {', '.join(SWITCHES)}, joined by +")
    return {key: value for name in names for key, value in SWITCHES[name].items()}


def spread(values: Sequence[float | None]) -> str:
    """The mean, and with several seeds the least and the most."""
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return f"not reached by {len(values) - len(there)} of {len(values)}"
    digits = 3 if max(there) < 2 else 0
    ends = f" ({min(there):.{digits}f} to {max(there):.{digits}f})" if len(there) > 1 else ""
    return f"{fmean(there):.{digits}f}{ends}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=DEFAULT, metavar="ROW",
                        help=f"none, or of {', '.join(SWITCHES)}, joined by +")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of weights, order and augmentation")
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help="images of a step")
    parser.add_argument("--images", type=int, default=1200, help="training images")
    parser.add_argument("--held-out", type=int, default=250, help="images that are scored")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads")
    parser.add_argument("--out", type=Path, default=Path("runs/successors"), help="folder of the runs")
    options = parser.parse_args()
    settings = {row: settings_of(row) for row in options.rows}
    torch.set_num_threads(options.threads)
    set_up_logging()
    begun = time.perf_counter()
    world = init_world("cpu")
    print(f"{'after ' + str(options.steps) + ' steps':32}{'AP':>24}{'AP50':>24}"
          f"{'steps to AP50 ' + str(WANTED_AP50):>24}{'s a step':>10}", flush=True)  # fmt: skip
    try:
        for row in options.rows:
            configs = [
                make_config(f"{row.replace('+', '-')}-{seed}", {**settings[row], "train.seed": seed}, options)
                for seed in options.seeds
            ]
            curves = [learn(config, world) for config in configs]
            columns = [spread([curve[-1][name] for curve in curves]) for name in ("AP", "AP50")]
            columns.append(spread([steps_to(WANTED_AP50, curve) for curve in curves]))
            seconds = min(options.batch / images_per_second(config) for config in configs)
            print(f"{row:32}" + "".join(f"{column:>24}" for column in columns) + f"{seconds:10.3f}", flush=True)
    finally:
        close(world)
    print(f"{(time.perf_counter() - begun) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
