from typing import Any

import pytest
import torch

from model.build import build_model
from model.config import DetrConfig
from model.weights.architecture import check_original, differences, hf_config, infer_config, notes_of_args, notes_of_hf
from model.weights.fit import unique_tensors
from tests.model.weights.test_names import VARIANTS, every_variant

SMALL: dict[str, Any] = {
    "backbone": "resnet18", "hidden_dim": 64, "num_classes": 7, "num_queries": 9, "ffn_dim": 48, "encoder_layers": 1,
    "decoder_layers": 2,
}  # fmt: skip


@every_variant
@pytest.mark.parametrize("backbone", ["resnet18", "resnet_tiny", "swin_nano", "vit_nano"])
def test_told_from_shapes(settings: dict[str, Any], backbone: str) -> None:
    config = DetrConfig(**(SMALL | {"backbone": backbone} | settings))
    model = build_model(config)
    notes = {"num_queries": 9}  # which no shape tells with two stages
    assert infer_config(model.state_dict(), config.arch, notes) == config
    assert infer_config(unique_tensors(model), config.arch, notes) == config


def test_mixed_queries_are_told_from_shapes() -> None:
    config = DetrConfig(**SMALL, with_box_refine=True, two_stage="mixed", look_forward_twice=True)
    state = build_model(config).state_dict()
    assert infer_config(state, config.arch, {"look_forward_twice": True}) == config
    assert differences(DetrConfig(**SMALL, with_box_refine=True), config) == ["two_stage: mixed"]


@pytest.mark.parametrize("backbone", ["resnet34", "resnet50", "resnet101", "swin_tiny", "swin_large_384", "vit_large"])
def test_backbones(backbone: Any) -> None:
    with torch.device("meta"):
        model = build_model(DetrConfig(**(SMALL | {"backbone": backbone, "with_box_refine": True, "two_stage": True})))
    assert infer_config(model.state_dict(), "deformable_detr", {}).backbone == backbone


def test_notes_tell_what_shapes_do_not() -> None:
    config = DetrConfig(**SMALL, heads=4, points=8, dilation=True, dropout=0.3, class_loss="softmax")
    state = build_model(config).state_dict()
    notes = {"heads": 4, "dilation": True, "dropout": 0.3, "class_loss": "softmax", "ffn_dim": 5}
    assert infer_config(state, "deformable_detr", notes) == config
    assert infer_config(state, "deformable_detr", {"points": 8}).heads == 4


def test_what_cannot_be_told() -> None:
    state = build_model(DetrConfig(**SMALL)).state_dict()
    with pytest.raises(ValueError, match=r"cannot be told without transformer\.level_embed"):
        infer_config({n: t for n, t in state.items() if n != "transformer.level_embed"}, "deformable_detr", {})
    with pytest.raises(ValueError, match="its backbone is none"):
        infer_config({n: t for n, t in state.items() if n != "backbone.conv1.weight"}, "deformable_detr", {})


@every_variant
def test_config_of_transformers_there_and_back(settings: dict[str, Any]) -> None:
    config = DetrConfig(**(SMALL | {"heads": 4, "dropout": 0.2} | settings))
    written = hf_config(config)
    assert len(written["id2label"]) == len(written["label2id"]) == 7
    assert written["auxiliary_loss"] == (config.arch == "deformable_detr")  # it changes what transformers' DETR detects
    state = build_model(config).state_dict()
    assert infer_config(state, config.arch, notes_of_hf(written)) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "resnet_tiny"}, "resnet_tiny"),
        ({"backbone_norm": "group_norm"}, "group_norm"),
        ({"backbone": "swin_tiny"}, "swin_tiny"),
        ({"backbone": "vit_small"}, "vit_small"),
        ({"dilation": True}, "dilated"),
        ({"class_loss": "softmax"}, "class loss softmax"),
        ({"hidden_dim": 32}, "under 64"),
        ({"with_box_refine": True, "two_stage": "mixed"}, "two_stage mixed"),
    ],
)
def test_what_transformers_has_not(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"transformers has not .*{message}"):
        hf_config(DetrConfig(**(SMALL | settings)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_loss": "softmax"}, "deformable_detr with the class loss softmax"),
        ({"arch": "detr", "feature_levels": 1, "class_loss": "focal"}, "detr with the class loss focal"),
        ({"arch": "detr", "feature_levels": 1, "class_loss": "vfl"}, "detr with the class loss vfl"),
        ({"backbone_norm": "group_norm"}, "resnet50 with group_norm"),
        ({"backbone": "swin_large"}, "swin_large"),
        ({"with_box_refine": True, "two_stage": "mixed"}, "two_stage mixed"),
    ],
)  # fmt: skip
def test_what_the_original_has_not(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"the original has not .*{message}"):
        check_original(DetrConfig(**({"backbone": "resnet50", "num_classes": 7} | settings)))


@pytest.mark.parametrize("class_loss", ["vfl", "ia_bce", "ma"])
def test_scores_that_are_sigmoids_are_others_too(class_loss: Any) -> None:
    config = DetrConfig(**SMALL, class_loss=class_loss)
    check_original(config)
    assert hf_config(config) == hf_config(DetrConfig(**SMALL))


def test_arguments_of_the_original() -> None:
    args = {"nheads": 8, "dec_n_points": 4, "dropout": 0.1, "dilation": False, "num_queries": 300, "lr": 2e-4}
    expected = {"heads": 8, "points": 4, "dropout": 0.1, "dilation": False, "num_queries": 300}
    assert notes_of_args(args) == expected


def test_differences_are_what_to_set() -> None:
    found = DetrConfig(with_box_refine=True, two_stage=True, num_classes=3, dropout=0.0)
    assert differences(DetrConfig(), found) == ["with_box_refine: true", "two_stage: true"]


def test_the_variants_are_different_ones() -> None:
    assert len({DetrConfig(**settings) for settings in VARIANTS.values()}) == len(VARIANTS)
