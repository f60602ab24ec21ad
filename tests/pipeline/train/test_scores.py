"""Scores of a run while it trains."""

import json
from pathlib import Path

import pytest

from pipeline.run_folder import RunFolder
from pipeline.train.scores import best_of, is_exhausted, loss_fall, scored


def write_scores(run: RunFolder, **values: float | None) -> None:
    for name, value in values.items():
        file = run.evaluation / name.replace("step", "checkpoint-") / "metrics.json"
        file.parent.mkdir(parents=True)
        file.write_text('{"AP": ' if value is None else json.dumps({"AP": 0.0, "AP50": value}))


def test_scores_come_in_the_order_of_the_steps(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert scored(run, "AP50") == {}
    write_scores(run, step100=0.5, step20=0.25, step3=0.5, step7=None)
    in_order = [("checkpoint-3", 0.5), ("checkpoint-20", 0.25), ("checkpoint-100", 0.5)]
    assert list(scored(run, "AP50").items()) == in_order
    assert best_of(scored(run, "AP50")) == "checkpoint-100"
    assert best_of({}) is None
    assert scored(run, "AP50", subset=20) == {}


@pytest.mark.parametrize(
    ("values", "patience", "is_over"),
    [
        ([], 1, False),
        ([0.5], 1, False),
        ([0.5, 0.4], 1, True),
        ([0.5, 0.5], 1, True),
        ([0.5, 0.6], 1, False),
        ([0.5, 0.4], 2, False),
        ([0.5, 0.4, 0.45], 2, True),
        ([0.5, 0.4, 0.45, 0.6], 2, False),
        ([0.5, 0.4, 0.6, 0.5], 2, False),
        ([0.5, 0.4, 0.3], None, False),
    ],
)
def test_patience(values: list[float], patience: int | None, is_over: bool) -> None:
    assert is_exhausted({f"checkpoint-{step}": value for step, value in enumerate(values)}, patience) == is_over


def test_the_fall_of_the_loss_at_this_learning_rate() -> None:
    def points(*values: tuple[float, float]) -> list[dict[str, float]]:
        return [{"train/loss": loss, "train/lr_main": rate} for loss, rate in values]

    falling = points(*[(10.0, 1.0)] * 15, *[(8.0, 1.0)] * 15)
    assert loss_fall(falling) == pytest.approx(0.2)
    assert loss_fall(falling[:19]) is None
    assert loss_fall(points(*[(20.0, 0.5)] * 30) + falling) == pytest.approx(0.2)
    assert loss_fall(falling + points(*[(7.0, 0.1)] * 19)) is None
    assert loss_fall([]) is None
