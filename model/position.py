"""Sine codes of positions: of the cells of a feature map, and of proposed boxes (arXiv 1706.03762, section 3.5).

Shapes: batch, height and width of a feature map, channels of the transformer. All codes are computed in fp32 or better.
"""

import math

import torch
from torch import Tensor

TEMPERATURE = 10000.0


def _sine(angles: Tensor, channels: int) -> Tensor:
    """Sines and cosines, interleaved, of `angles` [...] at `channels` / 2 wavelengths: [..., channels]."""
    index = torch.arange(channels, device=angles.device, dtype=angles.dtype)
    wavelength = TEMPERATURE ** (2 * index.div(2, rounding_mode="floor") / channels)
    phases = angles[..., None] / wavelength
    return torch.stack((phases[..., 0::2].sin(), phases[..., 1::2].cos()), dim=-1).flatten(-2)


def encode_cells(
    mask: Tensor, channels: int, dtype: torch.dtype = torch.float32, *, from_centres: bool = True
) -> Tensor:
    """Code of every cell of a feature map, by where it lies in the valid part of its image.

    Args:
        mask: `[batch, height, width]` bool, True on padding.
        channels: width of the code; the first half is of y, the second of x.
        dtype: of the result, fp32 or fp64.
        from_centres: measure from the centres of the cells (Deformable DETR), not from their far edges (DETR).

    Returns:
        `[batch, height * width, channels]`.
    """
    valid = ~mask
    y = valid.cumsum(1, dtype=dtype)
    x = valid.cumsum(2, dtype=dtype)
    shift = 0.5 if from_centres else 0.0
    y = (y - shift) / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
    x = (x - shift) / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
    return torch.cat((_sine(y, channels // 2), _sine(x, channels // 2)), dim=-1).flatten(1, 2)


def encode_boxes(boxes: Tensor, channels: int) -> Tensor:
    """Code of boxes `[..., 4]` cxcywh in 0..1, each coordinate by `channels` numbers: `[..., 4 * channels]`."""
    return _sine(boxes * (2 * math.pi), channels).flatten(-2)
