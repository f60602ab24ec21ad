"""Which shapes of the operator's inputs fit together; `csrc/checks.h` says the same for the kernels.

Shapes: B batch, S cells of all levels, M heads, D channels of a head, Q queries, L levels, P points.
"""

from collections.abc import Sequence

from torch import Tensor

_TAKES = (
    "ms_deform_attn takes value [B, S, M, D], sampling_locations [B, Q, M, L, P, 2] and attention_weights "
    "[B, Q, M, L, P]"
)


def check_shapes(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> None:
    """Refuse shapes that do not fit together.

    Args:
        value: `[B, S, M, D]`.
        spatial_shapes: L pairs (H, W).
        sampling_locations: `[B, Q, M, L, P, 2]`.
        attention_weights: `[B, Q, M, L, P]`.

    Raises:
        ValueError: naming the input and the shapes.
    """
    dimensions = {"value": (value, 4), "sampling_locations": (sampling_locations, 6)}
    for name, (tensor, ndim) in (dimensions | {"attention_weights": (attention_weights, 5)}).items():
        if tensor.ndim != ndim:
            raise ValueError(f"{name}: expected {ndim} dimensions, got {list(tensor.shape)}; {_TAKES}")
    batch, cells, heads, _ = value.shape
    if sum(h * w for h, w in spatial_shapes) != cells:
        raise ValueError(f"spatial_shapes {list(spatial_shapes)} do not add up to the {cells} cells of value")
    if sampling_locations.shape[:-1] != attention_weights.shape or sampling_locations.shape[-1] != 2:
        raise ValueError(
            f"sampling_locations {tuple(sampling_locations.shape)} do not fit attention_weights "
            f"{tuple(attention_weights.shape)}"
        )
    b, _, m, levels, _ = attention_weights.shape
    if (b, m, levels) != (batch, heads, len(spatial_shapes)):
        raise ValueError(
            f"attention_weights {tuple(attention_weights.shape)} do not fit value {tuple(value.shape)} and "
            f"{len(spatial_shapes)} levels"
        )
