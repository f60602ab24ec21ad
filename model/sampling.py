"""What deformable attention looks at: its sampled points and weights, in the frame of the image.

    with record_sampling(detector.transformer.decoder.layers[-1].cross_attn) as calls:
        detector(batch)
    calls[0].points  # of the last decoder layer

Shapes: B batch, Q queries, M heads, L levels, P points a head and level.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.deformable_attention import MSDeformAttn
from model.deformable_transformer import valid_ratio


@dataclass(frozen=True)
class Sampling:
    """One call of a deformable attention. Points are (x, y) in 0..1 of the image without its padding."""

    points: Tensor
    """[B, Q, M, L, P, 2]; one outside 0..1 lies beside the image and adds nothing."""
    weights: Tensor
    """[B, Q, M, L, P]; those of a head add up to 1 over all levels."""
    reference: Tensor
    """[B, Q, 2], the reference point, or the centre of the reference box."""
    shapes: list[tuple[int, int]]
    """L pairs (H, W): cells of the levels, padding included."""


@contextmanager
def record_sampling(attention: MSDeformAttn) -> Iterator[list[Sampling]]:
    """Keep what an attention samples while the context is open; one entry a call.

    The points are worked out once more from the inputs of the call, so that nothing is kept where nobody asks.
    """
    calls: list[Sampling] = []

    def keep(module: MSDeformAttn, inputs: tuple[Any, ...], output: Tensor) -> None:
        query, reference, _, levels, padding = inputs
        locations, weights = module.sampling(query, reference, levels)
        ratios = _valid_ratios(levels.shapes, padding, locations.dtype)  # [B, L, 2]
        points = locations / ratios[:, None, None, :, None]
        centre = (reference[..., :2] / ratios[:, None])[:, :, 0]  # the same on every level
        calls.append(Sampling(points, weights, centre, list(levels.shapes)))

    handle = attention.register_forward_hook(keep)
    try:
        yield calls
    finally:
        handle.remove()


def _valid_ratios(shapes: Sequence[tuple[int, int]], padding: Tensor, dtype: torch.dtype) -> Tensor:
    """The part (width, height) of each level's canvas that the image fills, from the padding of all cells."""
    masks = torch.split_with_sizes(padding, [height * width for height, width in shapes], dim=1)
    return torch.stack(
        [valid_ratio(mask.reshape(-1, *shape), dtype) for mask, shape in zip(masks, shapes, strict=True)], dim=1
    )
