"""pipeline/train/flops.py: what a step computes, and the time of a card for it."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.config import DetrConfig
from pipeline.config.sections import TrainSection
from pipeline.train.cards import find_card
from pipeline.train.flops import LeastTime, least_time, micro_batch
from tests.pipeline.train.runs import MODEL, SETTINGS

TRAIN = TrainSection.model_validate({**SETTINGS, "micro_batch": 2})
CANVASES = [(320, 480), (800, 1344)]


@pytest.mark.parametrize(
    ("settings", "precision"),
    [({}, "fp32"), ({"arch": "detr", "feature_levels": 1}, "bf16")],
    ids=["fp32", "detr"],
)
def test_other_canvases_follow_from_the_counted(settings: dict[str, Any], precision: Any) -> None:
    architecture = replace(DetrConfig(num_classes=3, **MODEL), **settings)
    train, card = TRAIN.model_copy(update={"precision": precision}), find_card("H100")
    work = [micro_batch(architecture, train, canvas).work() for canvas in CANVASES]
    expected = sum(card.seconds(replace(each, moved=0.0), precision, 1.0) for each in work)
    assert LeastTime(architecture, train, card)(CANVASES) == pytest.approx(expected, rel=0.01)


def test_what_is_computed_again_does_not_count() -> None:
    architecture, card = DetrConfig(num_classes=3, **MODEL), find_card("H100")
    again = TRAIN.model_copy(update={"activation_checkpointing": True})
    assert LeastTime(architecture, again, card)(CANVASES) == LeastTime(architecture, TRAIN, card)(CANVASES)


def test_a_device_whose_most_is_not_known_has_none() -> None:
    assert least_time(DetrConfig(num_classes=3, **MODEL), TRAIN, torch.device("cpu")) is None
