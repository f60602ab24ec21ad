"""Feature extractors: backbone (what all have), resnet, transformer (which these share), swin, vit, make (by name)."""

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
from model.backbones.vit import ViT

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
    "ViT",
    "make_backbone",
]
