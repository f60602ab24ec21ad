"""Backbones by their names."""

from typing import get_args, get_type_hints

import pytest
import torch

from model.backbones.make import BACKBONES, make_backbone
from model.config import DetrConfig


def test_every_name_that_a_configuration_may_have_is_made() -> None:
    assert tuple(BACKBONES) == get_args(get_type_hints(DetrConfig)["backbone"])
    for name in BACKBONES:
        with torch.device("meta"):
            backbone = make_backbone(name, "group_norm", dilation=True, only_last=True)
        assert backbone.name == name
        assert len(backbone.channels) == 1


def test_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r'backbone is "vgg", it must be one of resnet18, .*resnet_tiny'):
        make_backbone("vgg", "group_norm")
