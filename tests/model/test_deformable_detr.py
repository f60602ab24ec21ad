import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model import Criterion, CriterionConfig, DetrConfig, ImageBatch, build_model
from model.deformable_detr import DeformableDetr, init_weights, offset_directions
from tests.builders import make_batch, make_target

VARIANTS = {
    "base": {},
    "refine": {"with_box_refine": True},
    "two-stage": {"with_box_refine": True, "two_stage": True},
    "single-scale": {"feature_levels": 1},
    "softmax": {"class_loss": "softmax"},
    "five levels": {"feature_levels": 5, "with_box_refine": True, "two_stage": True},
    "no encoder": {"encoder_layers": 0},
}
every_variant = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())


def make_detector(seed: int = 0, **settings: Any) -> DeformableDetr:
    small = {"backbone": "resnet_tiny", "backbone_norm": "group_norm", "hidden_dim": 32, "heads": 4, "ffn_dim": 48}
    small |= {"num_queries": 12, "num_classes": 5, "encoder_layers": 1, "decoder_layers": 3, "points": 2}
    return build_model(DetrConfig(**(small | settings)), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("settings", "everything", "trainable", "tensors"),
    [
        pytest.param({}, 40_069_665, 39_847_265, 561, id="base"),
        pytest.param({"with_box_refine": True}, 40_849_660, 40_627_260, 597, id="refine"),
        pytest.param({"with_box_refine": True, "two_stage": True}, 41_181_529, 40_959_129, 630, id="two-stage"),
        pytest.param({"feature_levels": 1}, 34_066_593, 33_844_193, 549, id="single-scale"),
    ],
)
def test_sizes_are_the_originals(settings: dict[str, Any], everything: int, trainable: int, tensors: int) -> None:
    with torch.device("meta"):
        model = build_model(DetrConfig(**settings))
    model.backbone.freeze("stem_and_layer1")
    assert sum(p.numel() for p in model.parameters()) == everything
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    assert len(model.state_dict()) == tensors


def test_names_are_the_originals() -> None:
    names = set(make_detector(with_box_refine=True, two_stage=True).state_dict())
    layer = "transformer.decoder.layers.2."
    assert {
        "backbone.layer1.0.conv1.weight",
        "input_proj.3.1.bias",
        "class_embed.3.weight",
        "bbox_embed.0.layers.2.bias",
        "transformer.level_embed",
        "transformer.pos_trans_norm.weight",
        "transformer.enc_output.weight",
        "transformer.encoder.layers.0.self_attn.sampling_offsets.bias",
        f"{layer}self_attn.in_proj_weight",
        f"{layer}cross_attn.output_proj.weight",
        "transformer.decoder.bbox_embed.3.layers.0.weight",
    } <= names
    assert "query_embed.weight" not in names
    assert {"query_embed.weight", "transformer.reference_points.bias"} <= set(make_detector().state_dict())


@every_variant
def test_outputs(settings: dict[str, Any]) -> None:
    model = make_detector(**settings)
    outputs: dict[str, Any] = model(make_batch([(64, 96), (80, 64)]))
    layers = [outputs, *outputs["aux_outputs"]]
    assert len(layers) == 3
    for layer in layers:
        assert layer["pred_logits"].shape == (2, 12, model.config.num_logits)
        assert layer["pred_boxes"].shape == (2, 12, 4)
        assert ((layer["pred_boxes"] >= 0) & (layer["pred_boxes"] <= 1)).all()
    assert ("enc_outputs" in outputs) == model.config.two_stage
    if model.config.two_stage:
        cells = sum(
            -(-80 // stride) * -(-96 // stride) for stride in (8, 16, 32, 64, 128)[: model.config.feature_levels]
        )
        assert outputs["enc_outputs"]["pred_logits"].shape == (2, cells, 5)


@every_variant
def test_every_trainable_parameter_gets_a_gradient(settings: dict[str, Any]) -> None:
    model = make_detector(**settings)
    targets = [make_target(3), make_target(2, seed=1)]
    for _ in range(2):  # heads that begin at zero let the gradient through after one step
        outputs = model(make_batch())
        criterion = Criterion(5, CriterionConfig(), model.config.class_loss)
        model.zero_grad()
        criterion.total(criterion(outputs, targets, 5.0)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(1e-3 * parameter.grad.sign())
    without = {name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()}
    # Only the encoder adds the level embedding.
    assert without == ({"transformer.level_embed"} if model.config.encoder_layers == 0 else set())


@every_variant
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (33, 7), (16, 300)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_small_images(settings: dict[str, Any], size: tuple[int, int]) -> None:
    model = make_detector(**settings)
    outputs: dict[str, Any] = model(make_batch([size]))
    criterion = Criterion(5, CriterionConfig(), model.config.class_loss)
    loss = criterion.total(criterion(outputs, [make_target(2)], 2.0))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_two_stage_with_fewer_cells_than_queries() -> None:
    outputs: dict[str, Any] = make_detector(num_queries=300, with_box_refine=True, two_stage=True)(
        make_batch([(96, 96)])
    )
    assert outputs["pred_logits"].shape[1] == 144 + 36 + 9 + 4
    assert torch.isfinite(outputs["pred_boxes"]).all()


def test_padding_mask_reaches_the_levels_by_nearest() -> None:
    model = make_detector()
    mask = torch.zeros(1, 70, 90, dtype=torch.bool)
    mask[:, 40:] = True
    mask[:, :, 50:] = True
    features, masks = model._levels(ImageBatch(torch.zeros(1, 3, 70, 90), mask))
    for feature, level in zip(features, masks, strict=True):
        height, width = feature.shape[2:]
        rows = [int(i * 70 / height) for i in range(height)]
        columns = [int(j * 90 / width) for j in range(width)]
        assert torch.equal(level[0], mask[0][rows][:, columns])
        assert not level[0, 0, 0]


def test_extra_levels_begin_at_raw_c5() -> None:
    model = make_detector(feature_levels=5)
    seen: list[tuple[int, ...]] = []
    for projection in model.input_proj:
        projection.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[1:])))
    model(make_batch([(128, 64)]))
    assert seen == [(64, 16, 8), (96, 8, 4), (128, 4, 2), (128, 4, 2), (32, 2, 1)]


def test_without_auxiliary_losses_only_the_last_layer_is_given() -> None:
    assert "aux_outputs" not in make_detector(auxiliary_losses=False)(make_batch())


def test_batch_of_one_is_the_same_as_within_a_batch() -> None:
    model = make_detector().double().eval()
    batch = make_batch([(64, 64), (64, 64)])
    together: Any = model(ImageBatch(batch.pixels.double(), batch.mask))["pred_boxes"]
    alone: Any = model(ImageBatch(batch.pixels[1:].double(), batch.mask[1:]))["pred_boxes"]
    torch.testing.assert_close(alone, together[1:])


def test_coordinates_are_fp32_under_autocast() -> None:
    model = make_detector(with_box_refine=True, two_stage=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs: dict[str, Any] = model(make_batch())
    for layer in (outputs, *outputs["aux_outputs"], outputs["enc_outputs"]):
        assert layer["pred_boxes"].dtype == layer["pred_logits"].dtype == torch.float32


class TestInitialWeights:
    @pytest.mark.parametrize("settings", [{}, {"with_box_refine": True}, {"with_box_refine": True, "two_stage": True}])
    def test_heads(self, settings: dict[str, Any]) -> None:
        model = make_detector(**settings)
        sizes = -2.0 if not model.config.two_stage else 0.0
        for index, (class_head, box_head) in enumerate(zip(model.class_embed, model.bbox_embed, strict=True)):
            last: Any = box_head.layers[-1]  # type: ignore[union-attr, index]
            first_sizes = sizes if index == 0 or not model.config.with_box_refine else 0.0
            assert last.bias.tolist() == [0.0, 0.0, first_sizes, first_sizes]
            assert not last.weight.any()
            torch.testing.assert_close(class_head.bias, torch.full((5,), -math.log(99)))
            assert torch.equal(class_head.weight, model.class_embed[0].weight)  # type: ignore[arg-type]
            shared = class_head is model.class_embed[0]
            assert shared == (index == 0 or not model.config.with_box_refine)
            assert torch.equal(box_head.layers[0].weight, model.bbox_embed[0].layers[0].weight)  # type: ignore

    def test_first_boxes_stand_on_their_references(self) -> None:
        model = make_detector()
        boxes: Any = model(make_batch())["pred_boxes"]
        position = model.query_embed.weight[:, :32]
        expected = model.transformer.reference_points(position).sigmoid()
        torch.testing.assert_close(boxes[0, :, :2], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(boxes[..., 2:], torch.full((2, 12, 2), 1 / (1 + math.e**2)))

    def test_softmax_has_no_prior(self) -> None:
        assert not make_detector(class_loss="softmax").class_embed[0].bias.any()  # type: ignore

    def test_offsets_by_hand(self) -> None:
        offsets = offset_directions(heads=8, levels=3, points=2)
        expected = torch.tensor([[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]])
        for level in range(3):
            torch.testing.assert_close(offsets[:, level, 0], expected.float(), atol=1e-6, rtol=0)
            torch.testing.assert_close(offsets[:, level, 1], 2 * expected.float(), atol=1e-5, rtol=0)

    def test_attention(self) -> None:
        model = make_detector()
        for attention in (
            model.transformer.encoder.layers[0].self_attn,
            model.transformer.decoder.layers[2].cross_attn,
        ):
            assert not any(p.any() for p in (attention.attention_weights.weight, attention.attention_weights.bias))  # type: ignore
            assert not attention.sampling_offsets.weight.any()  # type: ignore
            torch.testing.assert_close(attention.sampling_offsets.bias, offset_directions(4, 4, 2).flatten())  # type: ignore
            assert not attention.value_proj.bias.any()  # type: ignore
            check_xavier(attention.value_proj.weight)  # type: ignore
            check_xavier(attention.output_proj.weight)  # type: ignore

    def test_the_rest_of_the_table(self) -> None:
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

    def test_nothing_is_left_out(self) -> None:
        """Every parameter is set: what was there before does not come through."""
        for settings in VARIANTS.values():
            model = make_detector(**settings)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(float("nan"))
            init_weights(model)
            assert not [name for name, p in model.named_parameters() if p.isnan().any()]

    def test_the_seed_decides(self) -> None:
        first, again, other = (make_detector(seed).state_dict() for seed in (0, 0, 1))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["class_embed.0.weight"], other["class_embed.0.weight"])


def check_xavier(weight: Tensor) -> None:
    outputs, inputs = nn.init._calculate_fan_in_and_fan_out(weight)[::-1]
    bound = math.sqrt(6 / (inputs + outputs))
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
