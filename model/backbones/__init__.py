"""Feature extractors."""

from model.backbones.resnet import (
    Backbone,
    BasicBlock,
    Bottleneck,
    Bottleneck64x4d,
    Dilation,
    Frozen,
    FrozenBatchNorm2d,
    MakeNorm,
    Norm,
)

__all__ = [
    "Backbone",
    "BasicBlock",
    "Bottleneck",
    "Bottleneck64x4d",
    "Dilation",
    "Frozen",
    "FrozenBatchNorm2d",
    "MakeNorm",
    "Norm",
]
