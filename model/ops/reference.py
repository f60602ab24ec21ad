"""Multi-scale deformable attention in plain torch: the truth that the compiled kernels are measured against.

One `grid_sample` a level. On a CPU it is also the fastest plain form found: gathers with `embedding_bag` and a dense
[query, cell] matrix both take longer, forward and backward together.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """See `model.ops.ms_deform_attn`. 16-bit inputs are summed in fp32 and the result has the type of `value`."""
    batch, _, heads, channels = value.shape
    queries, levels, points = sampling_locations.shape[1], sampling_locations.shape[3], sampling_locations.shape[4]
    exact = torch.promote_types(value.dtype, torch.float32)
    # grid_sample's coordinates run over -1..1 from edge to edge of the map.
    grids = (2 * sampling_locations.to(exact) - 1).transpose(1, 2).flatten(0, 1)  # [batch * heads, Q, L, P, 2]
    sampled = []
    levels_of_value = torch.split(value.to(exact), [h * w for h, w in spatial_shapes], dim=1)
    for level, ((height, width), level_value) in enumerate(zip(spatial_shapes, levels_of_value, strict=True)):
        image = level_value.flatten(2).transpose(1, 2).reshape(batch * heads, channels, height, width)
        # [batch * heads, D, Q, P]; zeros outside, a cell's value stands at its centre (align_corners=False)
        sampled.append(F.grid_sample(image, grids[:, :, level], "bilinear", "zeros", align_corners=False))
    weights = attention_weights.to(exact).transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    output = (torch.stack(sampled, dim=-2).flatten(-2) * weights).sum(-1)  # [batch * heads, D, Q]
    return output.view(batch, heads * channels, queries).transpose(1, 2).contiguous().to(value.dtype)
