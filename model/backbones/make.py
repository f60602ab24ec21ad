"""A backbone by its name."""

from collections.abc import Callable

from model.backbones import resnet
from model.backbones.resnet import Backbone, Norm

MakeBackbone = Callable[[str, Norm, bool, bool], Backbone]
"""Takes the arguments of `make_backbone`."""
BACKBONES: dict[str, MakeBackbone] = dict.fromkeys(resnet.NAMES, Backbone)
"""What makes the backbone of each name that `DetrConfig.backbone` may have."""


def make_backbone(name: str, norm: Norm, dilation: bool = False, only_last: bool = False) -> Backbone:
    """A feature extractor without weights.

    Args:
        name: one of `BACKBONES`.
        norm: the norm of every convolution.
        dilation: double the resolution of C5 (DC5).
        only_last: give C5 alone instead of C3, C4 and C5.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in BACKBONES:
        raise ValueError(f'backbone is "{name}", it must be one of {", ".join(BACKBONES)}')
    return BACKBONES[name](name, norm, dilation, only_last)
