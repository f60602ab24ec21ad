"""ResNet and ResNeXt (arXiv 1512.03385, 1611.05431) as feature extractors, with torchvision's names, no classifier.

Norms are frozen batch norm, for published weights, or group norm, for training from scratch: statistics of a batch are
never used, so an image's features do not depend on what else is in its batch.
"""

import re
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbones.backbone import Backbone

Norm = Literal["frozen_batch_norm", "group_norm"]


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with fixed statistics and affine terms: four buffers, nothing that is trained."""

    eps = 1e-5
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[batch, channels, height, width]`."""
        buffers = (self.running_mean, self.running_var, self.weight, self.bias)
        if torch.is_grad_enabled() and x.requires_grad:
            output: Tensor = _FrozenBatchNorm.apply(x, *buffers, self.eps)  # type: ignore[no-untyped-call]
            return output
        return F.batch_norm(x, *buffers, eps=self.eps)


class _FrozenBatchNorm(torch.autograd.Function):
    """Batch norm whose backward pass needs a scale a channel alone: torch's keeps the input, to train the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(weight * torch.rsqrt(var + eps))
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        return (grads[0] * scale[:, None, None]).to(grads[0].dtype), None, None, None, None, None


def _group_norm(channels: int) -> nn.Module:
    """16 channels a group, the other good choice of arXiv 1803.08494 (table 3); it suits narrow nets too."""
    return nn.GroupNorm(max(1, channels // 16), channels)


MakeNorm = Callable[[int], nn.Module]
Dilation = tuple[int, int]
"""Of the 3x3 convolution of a block that strides, and of one after it."""

_NORMS: dict[str, MakeNorm] = {"frozen_batch_norm": FrozenBatchNorm2d, "group_norm": _group_norm}


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, dilation: Dilation, norm: MakeNorm) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 3, stride, dilation[0])
        self.bn1 = norm(width)
        self.conv2 = _conv(width, width, 3, dilation=dilation[1])
        self.bn2 = norm(width)
        self.downsample = _shortcut(inputs, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, inputs, H, W]` to `[batch, width, H / stride, W / stride]`."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; the stride is in the 3x3, as in torchvision."""

    expansion = 4
    groups = 1
    group_width = 64
    """Channels of a group of the 3x3 convolution where the stage is 64 wide; it grows with the stage."""

    def __init__(self, inputs: int, width: int, stride: int, dilation: Dilation, norm: MakeNorm) -> None:
        super().__init__()
        inner = width * self.group_width // 64 * self.groups
        self.conv1 = _conv(inputs, inner, 1)
        self.bn1 = norm(inner)
        self.conv2 = _conv(inner, inner, 3, stride, dilation[0], self.groups)
        self.bn2 = norm(inner)
        self.conv3 = _conv(inner, width * self.expansion, 1)
        self.bn3 = norm(width * self.expansion)
        self.downsample = _shortcut(inputs, width * self.expansion, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, inputs, H, W]` to `[batch, 4 * width, H / stride, W / stride]`."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)), inplace=True)


class Bottleneck64x4d(Bottleneck):
    """The bottleneck of ResNeXt 64x4d."""

    groups = 64
    group_width = 4


def _shortcut(inputs: int, outputs: int, stride: int, norm: MakeNorm) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), norm(outputs))


Block = type[BasicBlock] | type[Bottleneck]

# name: (block, blocks of each stage, width of each stage)
_ARCHITECTURES: dict[str, tuple[Block, tuple[int, ...], tuple[int, ...]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet34": (BasicBlock, (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet50": (Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet101": (Bottleneck, (3, 4, 23, 3), (64, 128, 256, 512)),
    "resnext101_64x4d": (Bottleneck64x4d, (3, 4, 23, 3), (64, 128, 256, 512)),
    "resnet_tiny": (BasicBlock, (1, 1, 1, 1), (32, 64, 96, 128)),
}
NAMES = tuple(_ARCHITECTURES)


def _stem(name: str, width: int, norm: MakeNorm) -> tuple[nn.Module, nn.Module]:
    """What comes before the first norm, `conv1`, and after it, `maxpool`: together a stride of 4."""
    if name != "resnet_tiny":
        return _conv(3, width, 7, stride=2), nn.MaxPool2d(3, stride=2, padding=1)
    convolutions = nn.Sequential(
        _conv(3, width // 2, 3, stride=2),
        norm(width // 2),
        nn.ReLU(),
        _conv(width // 2, width // 2, 3),
        norm(width // 2),
        nn.ReLU(),
        _conv(width // 2, width, 3, stride=2),
    )
    return convolutions, nn.Identity()


def _stage(
    block: Block, depth: int, inputs: int, width: int, stride: int, dilated: bool, norm: MakeNorm
) -> nn.Sequential:
    """Blocks of a width, the first of which strides."""
    # What comes before a stride that is left out sees the grid it was trained on, undilated.
    dilations = [(1, 2)] + [(2, 2)] * (depth - 1) if dilated else [(1, 1)] * depth
    first = block(inputs, width, stride, dilations[0], norm)
    others = [block(width * block.expansion, width, 1, dilation, norm) for dilation in dilations[1:]]
    return nn.Sequential(first, *others)


class ResNet(Backbone):
    """The stages of a ResNet whose outputs a detector uses.

    Args:
        name: `resnet18`, `resnet34`, `resnet50`, `resnet101`, `resnext101_64x4d`, or `resnet_tiny` (0.5 M parameters, a
            stem of three 3x3 convolutions, for small images on a CPU).
        norm: the norm of every convolution.
        dilation: dilate the last stage instead of striding it (DC5), which doubles the resolution of C5: every other
            cell is what it was. (So are torchvision's bottlenecks; it does not dilate the nets of basic blocks.)
        only_last: give C5 alone instead of C3, C4 and C5.
    """

    early = ("conv1.", "bn1.", "layer1.")

    def __init__(self, name: str, norm: Norm, dilation: bool = False, only_last: bool = False) -> None:
        super().__init__()
        block, self.depths, widths = _ARCHITECTURES[name]
        make_norm = _NORMS[norm]
        self.name = name
        self.only_last = only_last
        self.conv1, self.maxpool = _stem(name, widths[0], make_norm)
        self.bn1 = make_norm(widths[0])
        inputs = widths[0]
        for stage, (depth, width) in enumerate(zip(self.depths, widths, strict=True), start=1):
            dilated = dilation and stage == 4
            stride = 1 if stage == 1 or dilated else 2
            self.add_module(f"layer{stage}", _stage(block, depth, inputs, width, stride, dilated, make_norm))
            inputs = width * block.expansion
        outputs = [width * block.expansion for width in widths[1:]]
        self.channels = tuple(outputs[-1:] if only_last else outputs)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Feature maps `[batch, channels, H / stride, W / stride]` of images `[batch, 3, H, W]`, strides 8, 16, 32."""
        pixels = pixels.to(next(self.parameters()).dtype)
        x = self.maxpool(F.relu(self.bn1(self.conv1(pixels)), inplace=True))
        features = []
        for stage in range(1, 5):
            x = self.run_block(self.get_submodule(f"layer{stage}"), x)
            features.append(x)
        return features[-1:] if self.only_last else features[1:]

    def _place(self, name: str) -> tuple[int, int] | None:
        match = re.match(r"layer(\d)\.(\d+)\.", name)
        return (int(match[1]) - 1, int(match[2])) if match else None
