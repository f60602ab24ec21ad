"""What a training step computes, as it is counted, and the least time that a card would need for it."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from model.complexity import MicroBatch
from model.config import DetrConfig
from pipeline.config.sections import TrainSection
from pipeline.train.cards import Card, card_of_device

COUNTED_SIDES = (256, 640, 1024)
"""Sides in pixels of the canvases that are counted."""


def micro_batch(architecture: DetrConfig, train: TrainSection, canvas: tuple[int, int]) -> MicroBatch:
    """A configured micro-batch on a canvas, to be counted."""
    return MicroBatch(
        architecture,
        train.micro_batch,
        canvas,
        frozen=train.freeze_backbone,
        autocast=getattr(torch, train.autocast) if train.autocast else None,
        recompute=train.activation_checkpointing,
    )


class LeastTime:
    """Seconds that a card would need for micro-batches if it did nothing but compute, at its data sheet's most.

    Counted for a few canvases when it is made, which takes seconds, and followed by a parabola of the pixels for all
    others: full attention grows with their square. What is computed again to save memory does not count.

    Args:
        architecture: of the network.
        train: how it is trained.
        card: has the precision.
    """

    def __init__(self, architecture: DetrConfig, train: TrainSection, card: Card) -> None:
        batches = [replace(micro_batch(architecture, train, (side, side)), recompute=False) for side in COUNTED_SIDES]
        seconds = [card.seconds(replace(batch.work(), moved=0.0), train.precision, 1.0) for batch in batches]
        self._parabola = np.polynomial.Polynomial.fit([side**2 for side in COUNTED_SIDES], seconds, 2)

    def __call__(self, canvases: Iterable[tuple[int, ...]]) -> float:
        """Of micro-batches on canvases of these heights and widths."""
        return float(sum(self._parabola(height * width) for height, width in canvases))


def least_time(architecture: DetrConfig, train: TrainSection, device: torch.device) -> LeastTime | None:
    """That of a device, or None where it is no card whose most is known."""
    card = card_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if card is None or not card.has(train.precision):
        return None
    return LeastTime(architecture, train, card)
