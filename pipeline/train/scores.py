"""Scores of a run's checkpoints while it trains: which one is the best, and whether they still get better."""

import json
from contextlib import suppress

from pipeline.config.sections import Metric
from pipeline.run_folder import RunFolder


def scored(run: RunFolder, metric: Metric) -> dict[str, float]:
    """The metric of every checkpoint that was scored, by name, in the order of their steps; it may be gone by now."""
    found: dict[str, float] = {}
    for name, file in run.scores().items():
        with suppress(KeyError, OSError, ValueError, TypeError):  # gone, or not yet whole
            found[name] = float(json.loads(file.read_text(encoding="utf-8"))[metric])
    return dict(sorted(found.items(), key=lambda item: int(item[0].removeprefix("checkpoint-"))))


def best_of(scores: dict[str, float]) -> str | None:
    """Name of the best; of equal ones the last."""
    return max(reversed(scores), key=lambda name: scores[name]) if scores else None


def is_exhausted(scores: dict[str, float], patience: int | None) -> bool:
    """Whether none of the last `patience` is better than all before them; None has patience for ever."""
    values = list(scores.values())
    if patience is None or len(values) <= patience:
        return False
    return max(values[-patience:]) <= max(values[:-patience])
