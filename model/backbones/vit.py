"""Plain vision transformers (arXiv 2010.11929) as feature extractors, with the names of DINOv2's release (arXiv
2304.07193), no class token and no classifier.

What makes a detector's backbone of them is ViTDet's (arXiv 2203.16527): patches of 16 pixels; attention in windows, but
for the last block of each quarter, which sees the whole map; and maps of three strides that are all made of the last
one. An image may have any size: the learned positions are resized to its map.

Shapes: B batch, H x W cells of a map, C channels, N cells that see each other.
"""

import re
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbones.backbone import Backbone
from model.backbones.transformer import Mlp, from_windows, padded, to_windows
from model.boxes import without_autocast
from model.dropout import DropPath

PATCH = 16
"""Side of the patches of pixels that become cells."""
WINDOW = 14
"""Side of a window, in cells."""
GRID = 37
"""Side of the map that positions are learned for: DINOv2's, of 518 pixels in patches of 14."""
EPS = 1e-6
"""Of the layer norms."""


class Architecture(NamedTuple):
    """The size of a plain vision transformer."""

    width: int
    """Channels."""
    depth: int
    """Blocks."""
    heads: int
    """Attention heads."""
    outputs: int = 256
    """Channels of the maps that are given."""


_ARCHITECTURES = {
    "vit_small": Architecture(384, 12, 6),
    "vit_base": Architecture(768, 12, 12),
    "vit_large": Architecture(1024, 24, 16),
    "vit_nano": Architecture(32, 8, 2, outputs=64),
}
NAMES = tuple(_ARCHITECTURES)


class Attention(nn.Module):
    """All cells attend to each other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, C]` to the same shape."""
        # [B, heads, N, C / heads] each
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(2, 0).transpose(2, 3).unbind()
        attended: Tensor = self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return attended


class LayerScale(nn.Module):
    """A factor for each channel of a branch (arXiv 2103.17239)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` to the same shape."""
        return x * self.gamma


class Block(nn.Module):
    """Attention and a feed-forward block, each after a norm and around a shortcut.

    Args:
        width: channels.
        heads: attention heads.
        windowed: whether only the cells of a window see each other.
        drop_path: probability that an image skips a branch in training.
    """

    def __init__(self, width: int, heads: int, windowed: bool, drop_path: float) -> None:
        super().__init__()
        self.windowed = windowed
        self.norm1 = nn.LayerNorm(width, EPS)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(width, EPS)
        self.mlp = Mlp(width)
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to the same shape."""
        x = x + self.drop_path(self.ls1(self._attended(self.norm1(x))))
        output: Tensor = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return output

    def _attended(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        if not self.windowed:
            whole: Tensor = self.attn(x.flatten(1, 2))
            return whole.view(x.shape)
        windows = to_windows(padded(x, WINDOW), WINDOW)
        attended = self.attn(windows.flatten(0, 2)).view(windows.shape)
        return from_windows(attended, WINDOW)[:, :height, :width]


class PatchEmbed(nn.Module):
    """Patches of pixels as cells."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)

    def forward(self, pixels: Tensor) -> Tensor:
        """`[B, 3, height, width]` to `[B, H, W, C]`, rounded up."""
        pixels = padded(pixels.permute(0, 2, 3, 1), PATCH).permute(0, 3, 1, 2)
        cells: Tensor = self.proj(pixels).permute(0, 2, 3, 1)
        return cells


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of `[B, C, H, W]`."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Level(nn.Sequential):
    """A map of a stride, of the one map of a plain transformer.

    Args:
        width: channels of that map.
        outputs: channels of this one.
        stride: 8, 16 or 32 pixels.
    """

    def __init__(self, width: int, outputs: int, stride: int) -> None:
        resized: dict[int, tuple[nn.Module, int]] = {
            8: (nn.ConvTranspose2d(width, width // 2, 2, stride=2), width // 2),
            16: (nn.Identity(), width),
            32: (nn.MaxPool2d(2, ceil_mode=True), width),
        }
        resize, inputs = resized[stride]
        super().__init__(
            resize,
            nn.Conv2d(inputs, outputs, 1, bias=False),
            ChannelNorm(outputs, EPS),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            ChannelNorm(outputs, EPS),
        )


class ViT(Backbone):
    """A plain vision transformer with a pyramid of maps.

    Args:
        name: `vit_small`, `vit_base`, `vit_large`, as DINOv2's, or `vit_nano` (0.3 M parameters, for tests and demos on
            a CPU).
        drop_path: probability that an image skips a branch of the last block in training; from the first on it rises
            evenly from 0 (stochastic depth, arXiv 1603.09382).
        only_last: give the map of stride 32 alone instead of 8, 16 and 32.
    """

    late: ClassVar = ("norm.", "pyramid.")

    def __init__(self, name: str, drop_path: float = 0.0, only_last: bool = False) -> None:
        super().__init__()
        width, depth, heads, outputs = _ARCHITECTURES[name]
        self.name = name
        self.depths = (depth // 4,) * 4
        self.early = ("patch_embed.", "pos_embed", *(f"blocks.{number}." for number in range(depth // 4)))
        self.patch_embed = PatchEmbed(width)
        self.pos_embed = nn.Parameter(torch.zeros(1, GRID**2, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, (number + 1) % (depth // 4) != 0, drop_path * number / (depth - 1))
            for number in range(depth)
        )
        self.norm = nn.LayerNorm(width, EPS)
        strides = (32,) if only_last else (8, 16, 32)
        self.pyramid = nn.ModuleDict({str(stride): Level(width, outputs, stride) for stride in strides})
        self.channels = (outputs,) * len(strides)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Feature maps `[B, channels, H / stride, W / stride]`, rounded up, of images `[B, 3, H, W]`, strides 8, 16,
        32.
        """
        height, width = pixels.shape[2:]
        x = self.patch_embed(pixels.to(self.pos_embed.dtype))
        x = x + self._positions(x.shape[1], x.shape[2])
        for block in self.blocks:
            x = self.run_block(block, x)
        x = self.norm(x).permute(0, 3, 1, 2)
        # A last patch that begins in the image's last 8 pixels has a second cell of stride 8 outside.
        return [
            level(x)[:, :, : -(-height // int(stride)), : -(-width // int(stride))]
            for stride, level in self.pyramid.items()
        ]

    def _positions(self, height: int, width: int) -> Tensor:
        """The learned positions, resized to a map `[H, W, C]`, whatever the precision around."""
        with without_autocast(self.pos_embed.device.type):
            down, across = (resizing(GRID, side, self.pos_embed.device) for side in (height, width))
            down, across = down.to(self.pos_embed.dtype), across.to(self.pos_embed.dtype)
            positions: Tensor = torch.einsum("hi,wj,ijc->hwc", down, across, self.pos_embed.view(GRID, GRID, -1))
            return positions

    def _place(self, name: str) -> tuple[int, int] | None:
        match = re.match(r"blocks\.(\d+)\.", name)
        return divmod(int(match[1]), self.depths[0]) if match else None


def resizing(old: int, new: int, device: torch.device) -> Tensor:
    """The bicubic resizing of a line of cells as a matrix `[new, old]` in fp64; as a product of matrices its gradients
    are the same each time on a GPU, too.
    """
    cells = torch.eye(old, dtype=torch.float64, device=device)
    return F.interpolate(cells[None, None], size=(new, old), mode="bicubic")[0, 0]


def patches_of(kernel: Tensor) -> Tensor:
    """A kernel for patches of another size, as DINOv2's of 14 pixels, for those of `PATCH`
    (FlexiViT, arXiv 2212.08013, section 3.4).

    A patch that is resized to `PATCH` pixels a side gives what the patch as it was gives under `kernel`; where patches
    become smaller, as nearly as may be.

    Args:
        kernel: `[C, 3, side, side]`.

    Returns:
        `[C, 3, PATCH, PATCH]`.
    """
    back = torch.linalg.pinv(resizing(kernel.shape[-1], PATCH, kernel.device).T)
    resized: Tensor = back @ kernel.double() @ back.T
    return resized.to(kernel.dtype)
