import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.init import init_weights, offset_directions
from tests.builders import make_batch, make_detector

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "refine": {"with_box_refine": True},
    "two-stage": {"with_box_refine": True, "two_stage": True},
    "mixed": {"with_box_refine": True, "two_stage": "mixed"},
    "single-scale": {"feature_levels": 1},
    "softmax": {"class_loss": "softmax"},
    "detr": {"arch": "detr"},
    "swin": {"backbone": "swin_nano", "backbone_norm": "frozen_batch_norm"},
    "vit": {"backbone": "vit_nano", "backbone_norm": "frozen_batch_norm"},
    "detr with focal loss": {"arch": "detr", "class_loss": "focal"},
}


@pytest.mark.parametrize("settings", [{}, {"with_box_refine": True}, {"with_box_refine": True, "two_stage": True}])
def test_heads(settings: dict[str, Any]) -> None:
    model = make_detector(**settings)
    sizes = -2.0 if not model.config.two_stage else 0.0
    for index, (class_head, box_head) in enumerate(zip(model.class_embed, model.bbox_embed, strict=True)):
        last: Any = box_head.layers[-1]
        first_sizes = sizes if index == 0 or not model.config.with_box_refine else 0.0
        assert last.bias.tolist() == [0.0, 0.0, first_sizes, first_sizes]
        assert not last.weight.any()
        torch.testing.assert_close(class_head.bias, torch.full((5,), -math.log(99)))
        assert torch.equal(class_head.weight, model.class_embed[0].weight)
        shared = class_head is model.class_embed[0]
        assert shared == (index == 0 or not model.config.with_box_refine)
        assert torch.equal(box_head.layers[0].weight, model.bbox_embed[0].layers[0].weight)


def test_first_boxes_stand_on_their_references() -> None:
    model = make_detector()
    boxes: Any = model(make_batch())["pred_boxes"]
    position = model.query_embed.weight[:, :32]
    expected = model.transformer.reference_points(position).sigmoid()
    torch.testing.assert_close(boxes[0, :, :2], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(boxes[..., 2:], torch.full((2, 12, 2), 1 / (1 + math.e**2)))


def test_softmax_has_no_prior() -> None:
    assert not make_detector(class_loss="softmax").class_embed[0].bias.any()


def test_offsets_by_hand() -> None:
    offsets = offset_directions(heads=8, levels=3, points=2)
    expected = torch.tensor([[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]])
    for level in range(3):
        torch.testing.assert_close(offsets[:, level, 0], expected.float(), atol=1e-6, rtol=0)
        torch.testing.assert_close(offsets[:, level, 1], 2 * expected.float(), atol=1e-5, rtol=0)


def test_attention() -> None:
    model = make_detector()
    for attention in (
        model.transformer.encoder.layers[0].self_attn,
        model.transformer.decoder.layers[2].cross_attn,
    ):
        assert not any(p.any() for p in (attention.attention_weights.weight, attention.attention_weights.bias))
        assert not attention.sampling_offsets.weight.any()
        torch.testing.assert_close(attention.sampling_offsets.bias, offset_directions(4, 4, 2).flatten())
        assert not attention.value_proj.bias.any()
        check_xavier(attention.value_proj.weight)
        check_xavier(attention.output_proj.weight)


def test_the_rest_of_the_table() -> None:
    model = make_detector(hidden_dim=256, num_queries=300)
    layer: Any = model.transformer.decoder.layers[0]
    for weight in (layer.self_attn.in_proj_weight, layer.linear1.weight, model.transformer.reference_points.weight):
        check_xavier(weight)
    assert not layer.self_attn.in_proj_bias.any()
    assert not model.transformer.reference_points.bias.any()
    assert 0 < layer.linear1.bias.abs().max() <= 1 / 16
    for embedding in (model.query_embed.weight, model.transformer.level_embed):
        assert embedding.std().item() == pytest.approx(1.0, abs=0.05)
    projection: Any = model.input_proj[0]
    check_xavier(projection[0].weight)
    assert not projection[0].bias.any()
    convolution: Any = model.backbone.get_submodule("layer3.0.conv2")
    assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / (96 * 9)), rel=0.02)


@pytest.mark.parametrize("class_loss", ["focal", "softmax"])
def test_detr(class_loss: str) -> None:
    model = make_detector(arch="detr", class_loss=class_loss, hidden_dim=256, num_queries=300)
    encoder, decoder = model.transformer.encoder.layers[0], model.transformer.decoder.layers[2]
    for attention in (encoder.self_attn, decoder.self_attn, decoder.multihead_attn):
        check_xavier(attention.in_proj_weight)
        check_xavier(attention.out_proj.weight)
        assert not attention.in_proj_bias.any()
        assert not attention.out_proj.bias.any()
    check_xavier(decoder.linear2.weight)
    assert model.query_embed.weight.std().item() == pytest.approx(1.0, abs=0.05)
    for layer in (model.input_proj, model.class_embed, *model.bbox_embed.layers):
        check_uniform(layer.weight, 1 / math.sqrt(layer.weight[0].numel()))
    if class_loss == "focal":
        torch.testing.assert_close(model.class_embed.bias, torch.full((5,), -math.log(99)))
    else:
        assert 0 < model.class_embed.bias.abs().max() <= 1 / 16


def test_swin() -> None:
    backbone = make_detector(**VARIANTS["swin"]).backbone
    block = backbone.layers[3].blocks[1]
    for weight in (
        block.mlp.fc1.weight,
        block.attn.relative_position_bias_table,
        backbone.layers[2].downsample.reduction.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not block.attn.qkv.bias.any()
    assert block.norm1.weight.eq(1).all()
    check_uniform(backbone.patch_embed.proj.weight, 1 / math.sqrt(48))


def test_vit() -> None:
    backbone = make_detector(**VARIANTS["vit"]).backbone
    for weight in (backbone.blocks[7].mlp.fc1.weight, backbone.pos_embed):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not backbone.blocks[0].attn.qkv.bias.any()
    assert backbone.blocks[0].ls1.gamma.eq(1).all()
    check_uniform(backbone.patch_embed.proj.weight, 1 / math.sqrt(3 * 16**2))
    check_uniform(backbone.pyramid["8"][3].weight, 1 / math.sqrt(64 * 9))


def test_nothing_is_left_out() -> None:
    """Every parameter is set: what was there before does not come through."""
    for settings in VARIANTS.values():
        model = make_detector(**settings)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        init_weights(model)
        assert not [name for name, p in model.named_parameters() if p.isnan().any()]


def test_the_seed_decides() -> None:
    first, again, other = (make_detector(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["class_embed.0.weight"], other["class_embed.0.weight"])


def check_xavier(weight: Tensor) -> None:
    outputs, inputs = nn.init._calculate_fan_in_and_fan_out(weight)[::-1]
    check_uniform(weight, math.sqrt(6 / (inputs + outputs)))


def check_uniform(weight: Tensor, bound: float) -> None:
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
