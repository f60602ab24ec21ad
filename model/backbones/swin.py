"""Swin transformers (arXiv 2103.14030) as feature extractors, with the official release's names, no classifier.

As in the release's detectors, an image may have any size: a map is padded with zeros to whole windows, which attention
sees, and each map that is given has a layer norm of its own, which ImageNet's files lack.

Shapes: B batch, H x W cells of a map, C channels, R x S windows of a map, N cells of a window.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.backbones.backbone import Backbone
from model.backbones.transformer import Mlp, from_windows, padded, round_up, to_windows
from model.dropout import DropPath

PATCH = 4
"""Side of the patches of pixels that become the cells of the first map."""


class Architecture(NamedTuple):
    """The size of a Swin transformer."""

    width: int
    """Channels of the first stage; each stage after it has twice as many."""
    depths: tuple[int, int, int, int]
    """Blocks of each stage."""
    heads: tuple[int, int, int, int]
    """Attention heads of each stage."""
    window: int = 7
    """Side of a window, in cells."""


_ARCHITECTURES = {
    "swin_tiny": Architecture(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_small": Architecture(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_base": Architecture(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_large": Architecture(192, (2, 2, 18, 2), (6, 12, 24, 48)),
    "swin_base_384": Architecture(128, (2, 2, 18, 2), (4, 8, 16, 32), window=12),
    "swin_large_384": Architecture(192, (2, 2, 18, 2), (6, 12, 24, 48), window=12),
    "swin_nano": Architecture(16, (2, 2, 2, 2), (1, 2, 4, 8)),
}
NAMES = tuple(_ARCHITECTURES)


class WindowAttention(nn.Module):
    """The cells of a window attend to each other, with a learned bias for each head and offset (section 3.2)."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, offsets: Tensor, apart: Tensor | None) -> Tensor:
        """`x` [B, R, S, N, C] to the same shape.

        Args:
            x: the cells of each window.
            offsets: `bias_rows`.
            apart: `cells_apart`, or None where all cells of a window see each other.
        """
        # [B, R, S, heads, N, C / heads] each
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(4, 0).transpose(-3, -2).unbind()
        bias = self.relative_position_bias_table[offsets].permute(2, 0, 1)  # [heads, N, N]
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1) + bias
        if apart is not None:
            scores = scores.masked_fill(apart, float("-inf"))
        attended: Tensor = self.proj((scores.softmax(-1) @ value).transpose(-3, -2).flatten(-2))
        return attended


class Block(nn.Module):
    """Attention in windows and a feed-forward block, each after a norm and around a shortcut.

    Args:
        width: channels.
        heads: attention heads.
        window: side of a window, in cells.
        moved: whether the windows are moved by half of their side, down and to the right.
        drop_path: probability that an image skips a branch in training.
    """

    def __init__(self, width: int, heads: int, window: int, moved: bool, drop_path: float) -> None:
        super().__init__()
        self.window = window
        self.shift = window // 2 if moved else 0
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, offsets: Tensor, apart: Tensor) -> Tensor:
        """`x` [B, H, W, C] to the same shape, with `bias_rows` and `cells_apart`."""
        x = x + self.drop_path(self._attended(self.norm1(x), offsets, apart))
        output: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return output

    def _attended(self, x: Tensor, offsets: Tensor, apart: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = padded(x, self.window)
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        x = to_windows(x, self.window)
        x = from_windows(self.attn(x, offsets, apart if self.shift else None), self.window)
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        return x[:, :height, :width]


class PatchEmbed(nn.Module):
    """Patches of pixels as cells."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)
        self.norm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        """`[B, 3, height, width]` to `[B, H, W, C]`."""
        pixels = padded(pixels.permute(0, 2, 3, 1), PATCH).permute(0, 3, 1, 2)
        cells: Tensor = self.norm(self.proj(pixels).permute(0, 2, 3, 1))
        return cells


class PatchMerging(nn.Module):
    """Four cells become one with twice the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H / 2, W / 2, 2 C]`, rounded up."""
        x = padded(x, 2)
        merged = torch.cat([x[:, row::2, column::2] for column in range(2) for row in range(2)], dim=-1)
        output: Tensor = self.reduction(self.norm(merged))
        return output


class Stage(nn.Module):
    """The blocks of a resolution, every other one with its windows moved by half of their side.

    Args:
        width: channels.
        heads: attention heads.
        window: side of a window, in cells.
        drop_path: of each block.
        last: no stage follows, for which cells would be merged.
    """

    def __init__(self, width: int, heads: int, window: int, drop_path: list[float], last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, heads, window, moved=number % 2 == 1, drop_path=p) for number, p in enumerate(drop_path)
        )
        self.downsample = None if last else PatchMerging(width)


class Swin(Backbone):
    """The stages of a Swin transformer whose outputs a detector uses.

    Args:
        name: `swin_tiny`, `swin_small`, `swin_base`, `swin_large`, with windows of 7 x 7 cells; `swin_base_384`,
            `swin_large_384`, with the windows of 12 x 12 of the releases for 384 x 384; or `swin_nano` (0.6 M
            parameters, windows of 7, for tests and demos on a CPU).
        drop_path: probability that an image skips a branch of the last block in training; from the first on it rises
            evenly from 0 (stochastic depth, arXiv 1603.09382).
        only_last: give C5 alone instead of C3, C4 and C5.
    """

    early = ("patch_embed.", "layers.0.")

    def __init__(self, name: str, drop_path: float = 0.0, only_last: bool = False) -> None:
        super().__init__()
        width, self.depths, heads, self.window = _ARCHITECTURES[name]
        self.name = name
        self.patch_embed = PatchEmbed(width)
        rates = [drop_path * block / (sum(self.depths) - 1) for block in range(sum(self.depths))]
        widths = [width * 2**stage for stage in range(4)]
        self.layers = nn.ModuleList()
        for stage, depth in enumerate(self.depths):
            self.layers.append(Stage(widths[stage], heads[stage], self.window, rates[:depth], last=stage == 3))
            del rates[:depth]
        self.outputs = (3,) if only_last else (1, 2, 3)
        """Stages whose maps are given."""
        for stage in self.outputs:
            self.add_module(f"norm{stage}", nn.LayerNorm(widths[stage]))
        self.channels = tuple(widths[stage] for stage in self.outputs)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Feature maps `[B, channels, H / stride, W / stride]`, rounded up, of images `[B, 3, H, W]`, strides 8, 16,
        32.
        """
        x = self.patch_embed(pixels.to(self.patch_embed.proj.weight.dtype))
        offsets = bias_rows(self.window, x.device)
        features = []
        for number, stage in enumerate(self.layers):
            apart = cells_apart(x.shape[1], x.shape[2], self.window, x.device)
            for block in stage.get_submodule("blocks").children():
                x = self.run_block(block, x, offsets, apart)
            if number in self.outputs:
                features.append(self.get_submodule(f"norm{number}")(x).permute(0, 3, 1, 2))
            if number < 3:
                x = stage.get_submodule("downsample")(x)
        return features

    def _place(self, name: str) -> tuple[int, int] | None:
        match = re.match(r"layers\.(\d)\.(?:blocks\.(\d+)|downsample)\.", name)
        if match is None:
            return None
        stage = int(match[1])
        return stage, self.depths[stage] - 1 if match[2] is None else int(match[2])


def bias_rows(window: int, device: torch.device) -> Tensor:
    """The row of the bias table for each pair of cells of a window `[N, N]`: by how far the first is below and to the
    right of the second.
    """
    steps = torch.arange(window, device=device)
    steps = steps[:, None] - steps + window - 1  # [window, window] in 0..2 * window - 2
    rows = steps[:, None, :, None] * (2 * window - 1) + steps[:, None]
    return rows.reshape(window**2, window**2)


def cells_apart(height: int, width: int, window: int, device: torch.device) -> Tensor:
    """Which pairs of cells of the moved windows do not see each other `[R, S, 1, N, N]`.

    The windows of the last row and column hold what was moved out of the map on the other side, too.
    """

    def parts(side: int) -> Tensor:
        cells = torch.arange(side, device=device).view(-1, window)  # [R or S, window]
        return (cells >= side - window).int() + (cells >= side - window // 2).int()

    down, across = (parts(round_up(side, window)) for side in (height, width))
    windows = (3 * down[:, None, :, None] + across[:, None]).flatten(2)  # [R, S, N]
    return (windows[..., None] != windows[..., None, :])[:, :, None]
