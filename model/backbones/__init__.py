"""Feature extractors."""

from model.backbones.make import BACKBONES, make_backbone
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
    "BACKBONES",
    "Backbone",
    "BasicBlock",
    "Bottleneck",
    "Bottleneck64x4d",
    "Dilation",
    "Frozen",
    "FrozenBatchNorm2d",
    "MakeNorm",
    "Norm",
    "make_backbone",
]
