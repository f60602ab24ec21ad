"""What transformers as backbones share: the feed-forward block, and maps cut into windows and put together again.

Shapes: B batch, H x W cells of a map, C channels, R x S windows of a map, N cells of a window.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    """The feed-forward block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` to the same shape."""
        output: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return output


def round_up(side: int, multiple: int) -> int:
    """The next multiple."""
    return -(-side // multiple) * multiple


def padded(x: Tensor, multiple: int) -> Tensor:
    """`[B, H, W, C]` with zeros below and to the right, so that H and W are multiples."""
    height, width = x.shape[1:3]
    return F.pad(x, (0, 0, 0, round_up(width, multiple) - width, 0, round_up(height, multiple) - height))


def to_windows(x: Tensor, side: int) -> Tensor:
    """`[B, H, W, C]`, H and W multiples of `side`, to `[B, R, S, N, C]`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, channels)
    return x.transpose(2, 3).flatten(3, 4)


def from_windows(x: Tensor, side: int) -> Tensor:
    """`[B, R, S, N, C]` to `[B, H, W, C]`."""
    batch, rows, columns, _, channels = x.shape
    x = x.reshape(batch, rows, columns, side, side, channels)
    return x.transpose(2, 3).reshape(batch, rows * side, columns * side, channels)
