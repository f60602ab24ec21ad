from typing import Any

import pytest
import torch
from torch import Tensor

from model.build import build_model
from model.config import DetrConfig
from model.weights.names import foreign_name, own_name, recognise, to_foreign, to_own

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "refine": {"with_box_refine": True},
    "two-stage": {"with_box_refine": True, "two_stage": True},
    "single-scale": {"feature_levels": 1},
    "detr": {"arch": "detr", "feature_levels": 1, "class_loss": "softmax"},
}
every_variant = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())


def state_of(settings: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    config = DetrConfig(backbone="resnet18", hidden_dim=64, num_queries=5, num_classes=4, **settings)
    return build_model(config, torch.Generator().manual_seed(0)).state_dict(), config.arch


@every_variant
@pytest.mark.parametrize("format", ["raydetr", "original", "hf"])
def test_names_there_and_back(settings: dict[str, Any], format: str) -> None:
    state, arch = state_of(settings)
    theirs = to_foreign(state, format, arch)
    again, unknown = to_own(theirs, format, arch)
    assert not unknown
    assert again.keys() == state.keys()
    assert not [name for name in state if not torch.equal(again[name], state[name])]
    assert recognise(theirs) == (format, arch)
    for name in theirs:
        own = own_name(name, format, arch)
        assert own is not None
        assert foreign_name(own, format, arch) == name


@pytest.mark.parametrize(
    ("arch", "own", "original", "hf"),
    [
        (
            "deformable_detr",
            "backbone.layer3.1.bn2.running_mean",
            "backbone.0.body.layer3.1.bn2.running_mean",
            "model.backbone.conv_encoder.model.encoder.stages.2.layers.1.layer.1.normalization.running_mean",
        ),
        (
            "deformable_detr",
            "backbone.layer2.0.downsample.0.weight",
            "backbone.0.body.layer2.0.downsample.0.weight",
            "model.backbone.conv_encoder.model.encoder.stages.1.layers.0.shortcut.convolution.weight",
        ),
        (
            "deformable_detr",
            "transformer.decoder.layers.5.norm1.bias",
            "transformer.decoder.layers.5.norm1.bias",
            "model.decoder.layers.5.encoder_attn_layer_norm.bias",
        ),
        (
            "deformable_detr",
            "transformer.decoder.layers.5.norm2.bias",
            "transformer.decoder.layers.5.norm2.bias",
            "model.decoder.layers.5.self_attn_layer_norm.bias",
        ),
        (
            "deformable_detr",
            "transformer.decoder.layers.0.cross_attn.sampling_offsets.bias",
            "transformer.decoder.layers.0.cross_attn.sampling_offsets.bias",
            "model.decoder.layers.0.encoder_attn.sampling_offsets.bias",
        ),
        (
            "deformable_detr",
            "transformer.pos_trans_norm.weight",
            "transformer.pos_trans_norm.weight",
            "model.pos_trans_norm.weight",
        ),
        (
            "deformable_detr",
            "transformer.decoder.bbox_embed.2.layers.0.weight",
            "transformer.decoder.bbox_embed.2.layers.0.weight",
            "model.decoder.bbox_embed.2.layers.0.weight",
        ),
        (
            "detr",
            "transformer.decoder.layers.5.norm1.bias",
            "transformer.decoder.layers.5.norm1.bias",
            "model.decoder.layers.5.self_attn_layer_norm.bias",
        ),
        (
            "detr",
            "transformer.decoder.layers.1.multihead_attn.out_proj.weight",
            "transformer.decoder.layers.1.multihead_attn.out_proj.weight",
            "model.decoder.layers.1.encoder_attn.out_proj.weight",
        ),
        (
            "detr",
            "transformer.decoder.norm.weight",
            "transformer.decoder.norm.weight",
            "model.decoder.layernorm.weight",
        ),
        ("detr", "class_embed.weight", "class_embed.weight", "class_labels_classifier.weight"),
        ("detr", "bbox_embed.layers.1.bias", "bbox_embed.layers.1.bias", "bbox_predictor.layers.1.bias"),
        ("detr", "input_proj.bias", "input_proj.bias", "model.input_projection.bias"),
    ],
)
def test_names_by_hand(arch: str, own: str, original: str, hf: str) -> None:
    assert foreign_name(own, "original", arch) == original
    assert foreign_name(own, "hf", arch) == hf
    assert own_name(hf, "hf", arch) == own_name(original, "original", arch) == own


def test_projections_are_split_in_the_order_query_key_value() -> None:
    stacked = torch.arange(12.0).view(6, 2)
    name = "transformer.decoder.layers.0.self_attn"
    theirs = to_foreign({f"{name}.in_proj_weight": stacked}, "hf", "deformable_detr")
    prefix = "model.decoder.layers.0.self_attn"
    expected = {f"{prefix}.{part}_proj.weight": rows for part, rows in zip("qkv", stacked.split(2), strict=True)}
    assert theirs.keys() == expected.keys()
    assert all(torch.equal(theirs[key], expected[key]) for key in expected)


def test_names_in_the_memory_of_transformers_and_of_timm_are_read() -> None:
    zero = torch.zeros(1)
    names = {
        "model.backbone.model.embedder.embedder.convolution.weight": "backbone.conv1.weight",
        "model.backbone.conv_encoder.model.layer1.0.conv1.weight": "backbone.layer1.0.conv1.weight",
        "model.backbone.model._backbone.bn1.bias": "backbone.bn1.bias",
        "model.encoder.layers.0.mlp.fc1.weight": "transformer.encoder.layers.0.linear1.weight",
        "model.decoder.layers.0.self_attn.o_proj.bias": "transformer.decoder.layers.0.self_attn.out_proj.bias",
    }
    own, unknown = to_own(dict.fromkeys(names, zero), "hf", "deformable_detr")
    assert list(own) == list(names.values())
    assert not unknown


def test_a_head_that_transformers_writes_once_stands_for_all_layers() -> None:
    tensors = {f"model.decoder.layers.{i}.fc1.bias": torch.zeros(1) for i in range(3)}
    own, _ = to_own({**tensors, "class_embed.0.weight": torch.ones(2)}, "hf", "deformable_detr")
    assert {name for name in own if "class_embed" in name} == {f"class_embed.{i}.weight" for i in range(3)}


def test_what_is_no_name_of_the_architecture() -> None:
    assert own_name("model.mask_head.weight", "hf", "detr") is None
    assert to_own({"backbone.fc.weight": torch.zeros(1)}, "original", "detr")[1] == ["backbone.fc.weight"]
    with pytest.raises(ValueError, match=r"the format hf has no name for transformer\.else"):
        to_foreign({"transformer.else": torch.zeros(1)}, "hf", "detr")
    assert recognise({"encoder.weight": torch.zeros(1)}) is None
