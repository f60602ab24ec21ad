"""Scores of a run's checkpoints while it trains: which one is the best, and whether they still get better."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from statistics import median

from pipeline.config.sections import Metric
from pipeline.run_folder import RunFolder

FEW_POINTS = 10
"""Fewer of them in a half tell nothing: a step's loss is that of its images."""


def scored(run: RunFolder, metric: Metric, subset: int = 0) -> dict[str, float]:
    """The metric of every checkpoint that was scored, by name, in the order of their steps; it may be gone by now.

    Args:
        run: the run.
        metric: which number.
        subset: on so many images of the validation split; 0 for all. Those of another number do not compare.
    """
    found: dict[str, float] = {}
    for name, file in run.scores(subset).items():
        with suppress(KeyError, OSError, ValueError, TypeError):  # gone, or not yet whole
            found[name] = float(json.loads(file.read_text(encoding="utf-8"))[metric])
    return dict(sorted(found.items(), key=lambda item: int(item[0].removeprefix("checkpoint-"))))


def best_of(scores: dict[str, float]) -> str | None:
    """Name of the best; of equal ones the last."""
    return max(reversed(scores), key=lambda name: scores[name]) if scores else None


def loss_fall(points: Sequence[Mapping[str, float]]) -> float | None:
    """By how much the loss has fallen from the first half of the points of training to the second, as a share.

    Args:
        points: of the training curves, in the order of their steps. Those before the newest learning rate do not
            count: a loss levels out before a drop of it, and falls after.

    Returns:
        What the medians say, or None where there are too few points.
    """
    rate = "train/lr_main"
    first = next((n for n in range(len(points), 0, -1) if points[n - 1][rate] != points[-1][rate]), 0)
    losses = [point["train/loss"] for point in points[first:]]
    half = len(losses) // 2
    return 1 - median(losses[half:]) / median(losses[:half]) if half >= FEW_POINTS else None


def is_exhausted(scores: dict[str, float], patience: int | None) -> bool:
    """Whether none of the last `patience` is better than all before them; None has patience for ever."""
    values = list(scores.values())
    if patience is None or len(values) <= patience:
        return False
    return max(values[-patience:]) <= max(values[:-patience])
