"""Feature extractors: backbone (what all have), resnet, swin, and make (by name)."""

from model.backbones.backbone import Backbone, Frozen
from model.backbones.make import BACKBONES, make_backbone
from model.backbones.resnet import (
    BasicBlock,
    Bottleneck,
    Bottleneck64x4d,
    Dilation,
    FrozenBatchNorm2d,
    MakeNorm,
    Norm,
    ResNet,
)
from model.backbones.swin import Swin

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
    "ResNet",
    "Swin",
    "make_backbone",
]
