"""The multi-scale deformable attention module (arXiv 2010.04159, section 4.1).

Shapes: B batch, Q queries, S cells of all levels, C hidden channels, M heads, L levels, P points a head and level.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.boxes import at_least_float32
from model.ops.operator import ms_deform_attn


class Levels(NamedTuple):
    """The levels of a forward pass, made once for all its layers."""

    shapes: Sequence[tuple[int, int]]
    """L pairs (H, W) of ints, for the operator."""
    sizes: Tensor
    """[L, 2] (width, height), for the offsets, in fp32 or better."""


def make_levels(shapes: Sequence[tuple[int, int]], like: Tensor) -> Levels:
    """Levels of the shapes; the sizes are of the type of `like` and filled on its device, not copied from the host."""
    sides = [like.new_full((), side) for height, width in shapes for side in (width, height)]
    return Levels(shapes, torch.stack(sides).view(-1, 2))


class MSDeformAttn(nn.Module):
    """Attention of each query to M * L * P sampled points instead of all cells.

    Where the points lie: the query predicts, for every head, level and point, an offset from its reference point and a
    weight. An offset is in cells of its level, so it is divided by that level's (width, height) before it is added to
    the reference point, which is a fraction of the padded canvas: the same offset reaches further on a coarser level.
    With reference boxes instead of points the offset is in halves of the box's size, split over the P points, so that
    points start inside the box whatever its scale; the level plays no part then. The softmax of the weights runs over
    all L * P points of a head at once, so that levels compete with each other.

    Padding: reference points are given per level, scaled by the part of the level's canvas that the image fills (the
    valid ratio), since padding may differ by a cell from level to level. Offsets are not kept off the padding; values
    of padded cells are set to 0 after their projection, like everything outside the canvas.
    """

    def __init__(self, hidden_dim: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(hidden_dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(hidden_dim, heads * levels * points)
        self.value_proj = nn.Linear(hidden_dim, hidden_dim)
        self.output_proj = nn.Linear(hidden_dim, hidden_dim)

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        source: Tensor,
        levels: Levels,
        padding: Tensor,
    ) -> Tensor:
        """Attend.

        Args:
            query: `[B, Q, C]`, with its position code.
            reference: `[B, Q, L, 2]` points (x, y) or `[B, Q, L, 4]` boxes cxcywh, in 0..1 over the level's canvas.
            source: `[B, S, C]` features of all levels.
            levels: what `source` has, one after the other.
            padding: `[B, S]`, True on padding.

        Returns:
            `[B, Q, C]`.
        """
        value = self.value_proj(source).masked_fill(padding[..., None], 0.0)
        value = value.view(value.shape[0], -1, self.heads, value.shape[-1] // self.heads)  # [B, S, M, D]
        locations, weights = self.sampling(query, reference, levels)
        output: Tensor = self.output_proj(ms_deform_attn(value, levels.shapes, locations, weights))
        return output

    def sampling(self, query: Tensor, reference: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        """The sampled points `[B, Q, M, L, P, 2]`, in 0..1 over the level's canvas, and weights `[B, Q, M, L, P]`."""
        batch, queries, _ = query.shape
        offsets = self.sampling_offsets(query).view(batch, queries, self.heads, self.levels, self.points, 2)
        weights = at_least_float32(self.attention_weights(query)).view(batch, queries, self.heads, -1)
        weights = F.softmax(weights, dim=-1).view(batch, queries, self.heads, self.levels, self.points)
        return self._locations(reference, at_least_float32(offsets), levels), weights

    def _locations(self, reference: Tensor, offsets: Tensor, levels: Levels) -> Tensor:
        """Sampling locations [B, Q, M, L, P, 2]: in fp32, as 16 bits would move a sample by a third of a cell."""
        reference = reference[:, :, None, :, None]  # [B, Q, 1, L, 1, 2 or 4]
        if reference.shape[-1] == 4:
            return reference[..., :2] + offsets / self.points * reference[..., 2:] * 0.5
        return reference + offsets / levels.sizes[:, None]
