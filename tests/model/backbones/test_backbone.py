"""What is frozen of a backbone, and how deep in it a parameter stands."""

from typing import Any

import pytest
import torch

from model.backbones.make import make_backbone


def make(name: str) -> Any:
    with torch.device("meta"):
        return make_backbone(name, "frozen_batch_norm")


@pytest.mark.parametrize(
    ("name", "early", "later"),
    [
        ("resnet50", {"conv1", "layer1"}, {"layer2", "layer3", "layer4"}),
        ("swin_tiny", {"patch_embed", "layers.0"}, {"layers.1", "layers.2", "layers.3", "norm1", "norm2", "norm3"}),
        (
            "vit_small",
            {"patch_embed", "pos_embed", "blocks.0", "blocks.1", "blocks.2"},
            {*(f"blocks.{number}" for number in range(3, 12)), "norm", "pyramid"},
        ),
    ],
)
def test_freeze(name: str, early: set[str], later: set[str]) -> None:
    backbone = make(name)

    def parts(trained: bool) -> set[str]:
        names = [name.split(".") for name, p in backbone.named_parameters() if p.requires_grad == trained]
        return {".".join(parts[: 2 if parts[0] in ("layers", "blocks") else 1]) for parts in names}

    backbone.freeze("stem_and_layer1")
    assert (parts(False), parts(True)) == (early, later)
    backbone.freeze("all")
    assert parts(True) == set()
    backbone.freeze("none")
    assert parts(False) == set()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "resnet50",
            {
                "layer4.2.conv3.weight": 0,
                "layer4.0.downsample.0.weight": 2,
                "layer3.5.conv1.weight": 3,
                "layer1.0.conv1.weight": 15,
                "conv1.weight": 16,
            },
        ),
        (
            "swin_tiny",
            {
                "norm1.weight": 0,
                "layers.3.blocks.1.mlp.fc2.bias": 0,
                "layers.3.blocks.0.attn.qkv.weight": 1,
                "layers.2.downsample.reduction.weight": 2,
                "layers.2.blocks.5.norm1.weight": 2,
                "layers.0.blocks.0.norm1.weight": 11,
                "patch_embed.norm.weight": 12,
            },
        ),
        (
            "vit_small",
            {
                "pyramid.8.0.weight": 0,
                "norm.bias": 0,
                "blocks.11.ls2.gamma": 0,
                "blocks.9.attn.qkv.weight": 2,
                "blocks.0.norm1.weight": 11,
                "patch_embed.proj.weight": 12,
                "pos_embed": 12,
            },
        ),
    ],
)
def test_blocks_above(name: str, expected: dict[str, int]) -> None:
    backbone = make(name)
    assert expected.keys() <= dict(backbone.named_parameters()).keys()
    assert {parameter: backbone.blocks_above(parameter) for parameter in expected} == expected
    depth = sum(backbone.depths)
    assert {backbone.blocks_above(parameter) for parameter, _ in backbone.named_parameters()} == set(range(depth + 1))
