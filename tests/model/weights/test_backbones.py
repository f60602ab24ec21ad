"""Names; which tensor is which is proved by the features, in test_swin.py and test_vit.py."""

import pytest
import torch

from model.backbones.make import make_backbone
from model.weights.backbones import BACKBONE_FORMATS, backbone_to_own, recognise_backbone


@pytest.mark.parametrize(
    ("backbone", "format"), [("resnet18", "torchvision"), ("swin_nano", "swin"), ("vit_nano", "dinov2")]
)
def test_our_names_are_the_official_ones(backbone: str, format: str) -> None:
    with torch.device("meta"):
        made = make_backbone(backbone, "frozen_batch_norm")
    assert recognise_backbone(made.state_dict()) == format
    assert isinstance(made, BACKBONE_FORMATS[format].kind)


def test_none_is_recognised() -> None:
    assert recognise_backbone(["layer1.0.conv9.weight", "blocks.0.attn.qkv.weight"]) is None


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("encoder.layer.3.layer_scale2.lambda1", "blocks.3.ls2.gamma"),
        ("dinov2.encoder.layer.11.norm1.bias", "blocks.11.norm1.bias"),
        ("dinov2_with_registers.encoder.layer.0.attention.output.dense.bias", "blocks.0.attn.proj.bias"),
        ("encoder.layer.0.attention.o_proj.weight", "blocks.0.attn.proj.weight"),
        ("encoder.layer.0.mlp.fc2.weight", "blocks.0.mlp.fc2.weight"),
        ("layernorm.weight", "norm.weight"),
    ],
)
def test_names_of_transformers_dinov2(name: str, own: str) -> None:
    assert list(backbone_to_own({name: torch.ones(2)}, "transformers_dinov2")[0]) == [own]


def test_projections_are_joined_and_what_is_unknown_is_named() -> None:
    parts = {
        f"encoder.layer.0.attention.attention.{part}.weight": torch.full((2, 2), number)
        for number, part in enumerate(("query", "key", "value"))
    }
    own, unknown = backbone_to_own(parts | {"encoder.layer.0.x": torch.ones(1)}, "transformers_dinov2")
    assert unknown == ["encoder.layer.0.x"]
    assert own.keys() == {"blocks.0.attn.qkv.weight"}
    assert own["blocks.0.attn.qkv.weight"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_the_class_token_and_the_size_of_patches_go() -> None:
    own, unknown = backbone_to_own(
        {"pos_embed": torch.arange(5.0).view(1, 5, 1), "patch_embed.proj.weight": torch.ones(4, 3, 14, 14)}, "dinov2"
    )
    assert own["pos_embed"].flatten().tolist() == [1, 2, 3, 4]
    assert own["patch_embed.proj.weight"].shape == (4, 3, 16, 16)
    assert not unknown
