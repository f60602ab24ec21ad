"""A backbone by its name."""

from model.backbones import resnet, swin, vit
from model.backbones.backbone import Backbone
from model.backbones.resnet import Norm, ResNet
from model.backbones.swin import Swin
from model.backbones.vit import ViT

BACKBONES = (*resnet.NAMES, *swin.NAMES, *vit.NAMES)
"""Names that `DetrConfig.backbone` may have."""


def make_backbone(
    name: str, norm: Norm, dilation: bool = False, only_last: bool = False, drop_path: float = 0.0
) -> Backbone:
    """A feature extractor without weights.

    Args:
        name: one of `BACKBONES`.
        norm: the norm of every convolution of a ResNet; transformers have layer norms.
        dilation: double the resolution of a ResNet's C5 (DC5).
        only_last: give C5 alone instead of C3, C4 and C5.
        drop_path: stochastic depth of a transformer.

    Raises:
        ValueError: there is none of that name.
    """
    if name in resnet.NAMES:
        return ResNet(name, norm, dilation, only_last)
    if name in swin.NAMES:
        return Swin(name, drop_path, only_last)
    if name in vit.NAMES:
        return ViT(name, drop_path, only_last)
    raise ValueError(f'backbone is "{name}", it must be one of {", ".join(BACKBONES)}')
