"""What several benchmarks share: the encoder's shape, and how two calls are timed beside each other."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SHAPES = [(100, 167), (50, 84), (25, 42), (13, 21)]
"""Height and width of the four levels of an 800 x 1333 image."""


def centres() -> Tensor:
    """Position `[S, 2]` of every cell of every level, in 0..1."""
    grids = []
    for height, width in SHAPES:
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        grids.append(torch.stack((x / width, y / height), -1).flatten(0, 1))
    return torch.cat(grids)


def seconds(calls: Sequence[Callable[[], object]], repeats: int, in_a_row: int = 1) -> list[float]:
    """Shortest time of each call.

    They take turns, so that whatever else the machine does meets all alike. In its turn a call is made `in_a_row`
    times: one that is over in a moment would else begin with the caches as the others left them.
    """
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, own in zip(calls, times, strict=True):
            for _ in range(in_a_row):
                start = time.perf_counter()
                call()
                if repeat:  # the first turn warms up
                    own.append(time.perf_counter() - start)
    return [min(own) for own in times]
