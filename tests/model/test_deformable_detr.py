from typing import Any

import pytest
import torch

from model.batch import ImageBatch
from model.build import build_model
from model.config import CriterionConfig, DetrConfig, OneToMany
from model.losses.criterion import Criterion
from model.losses.groups import groups_of
from tests.builders import make_batch, make_detector, make_target

VARIANTS = {
    "base": {},
    "refine": {"with_box_refine": True},
    "two-stage": {"with_box_refine": True, "two_stage": True},
    "mixed": {"with_box_refine": True, "two_stage": "mixed", "look_forward_twice": True},
    "single-scale": {"feature_levels": 1},
    "softmax": {"class_loss": "softmax"},
    "varifocal": {"class_loss": "vfl"},
    "IoU-aware": {"class_loss": "ia_bce"},
    "matchability-aware": {"class_loss": "ma"},
    "five levels": {"feature_levels": 5, "with_box_refine": True, "two_stage": True},
    "no encoder": {"encoder_layers": 0},
    "hybrid": {"one_to_many": OneToMany(20, 3)},
    "hybrid two-stage": {"with_box_refine": True, "two_stage": True, "one_to_many": OneToMany(20, 3)},
    "hybrid mixed": {"with_box_refine": True, "two_stage": "mixed", "one_to_many": OneToMany(20, 3)},
}
every_variant = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())


@pytest.mark.parametrize(
    ("settings", "everything", "trainable", "tensors"),
    [
        pytest.param({}, 40_069_665, 39_847_265, 561, id="base"),
        pytest.param({"with_box_refine": True}, 40_849_660, 40_627_260, 597, id="refine"),
        pytest.param({"with_box_refine": True, "two_stage": True}, 41_181_529, 40_959_129, 630, id="two-stage"),
        pytest.param({"with_box_refine": True, "two_stage": "mixed"}, 41_126_489, 40_904_089, 631, id="mixed"),
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
    assert ("enc_outputs" in outputs) == bool(model.config.two_stage)
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
        criterion = Criterion(CriterionConfig(), model.config.class_loss)
        model.zero_grad()
        criterion(groups_of(outputs, targets, model.config.one_to_many), 5.0).total().backward()
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
    criterion = Criterion(CriterionConfig(), model.config.class_loss)
    loss = criterion(groups_of(outputs, [make_target(2)], model.config.one_to_many), 2.0).total()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@every_variant
@pytest.mark.parametrize("counts", [(0, 0), (400, 1)], ids=["no object", "400 objects"])
def test_empty_and_crowded_images(settings: dict[str, Any], counts: tuple[int, int]) -> None:
    """With two stages the 96 x 96 image has 193 cells: fewer than queries, and fewer than objects."""
    model = make_detector(num_queries=300, **settings)
    outputs: dict[str, Any] = model(make_batch([(96, 96), (64, 96)]))
    criterion = Criterion(CriterionConfig(), model.config.class_loss)
    targets = [make_target(n, seed=n) for n in counts]
    found = criterion(groups_of(outputs, targets, model.config.one_to_many), float(sum(counts)))
    found.total().backward()
    losses = found.values
    assert all(torch.isfinite(loss) for loss in losses.values())
    # With two stages no cell is left for queries beyond the 300.
    some = {name for name in losses if "ce" not in name and not ("many" in name and model.config.two_stage)}
    assert all((losses[name] > 0) == (sum(counts) > 0) for name in some)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


class TestOneToMany:
    """Queries that training alone has."""

    @pytest.fixture(params=[False, True, "mixed"], ids=["one stage", "two-stage", "mixed"])
    def pair(self, request: pytest.FixtureRequest) -> tuple[Any, Any]:
        """A detector without and with them, in fp64 and moved off its initial weights, otherwise the same."""
        settings = {"with_box_refine": bool(request.param), "two_stage": request.param, "dropout": 0.0}
        without, hybrid = (make_detector(one_to_many=many, **settings).double() for many in (None, OneToMany(20, 3)))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in without.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        missing = hybrid.load_state_dict(without.state_dict(), strict=False).missing_keys
        assert missing == ([] if request.param is True else ["one_to_many_embed.weight"])
        return without, hybrid

    def test_both_begin_with_the_same_weights(self) -> None:
        without, hybrid = make_detector(), make_detector(one_to_many=OneToMany())
        state = hybrid.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in without.state_dict().items())

    def test_inference_is_the_same_to_the_bit(self, pair: tuple[Any, Any]) -> None:
        batch = make_batch([(96, 96), (80, 64)])
        batch = ImageBatch(batch.pixels.double(), batch.mask)
        expected, found = (model.eval()(batch) for model in pair)
        assert found.keys() == expected.keys()
        assert torch.equal(found["pred_logits"], expected["pred_logits"])
        assert torch.equal(found["pred_boxes"], expected["pred_boxes"])

    def test_queries_of_a_group_do_not_see_the_others(self, pair: tuple[Any, Any]) -> None:
        batch = make_batch([(96, 96), (80, 64)])
        batch = ImageBatch(batch.pixels.double(), batch.mask)
        expected, found = (model.train()(batch) for model in pair)
        assert found.pop("one_to_many")["pred_boxes"].shape == (2, 20, 4)
        for layer, wanted in zip([found, *found["aux_outputs"]], [expected, *expected["aux_outputs"]], strict=True):
            torch.testing.assert_close(layer["pred_logits"], wanted["pred_logits"], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(layer["pred_boxes"], wanted["pred_boxes"], rtol=1e-9, atol=1e-9)

    def test_images_with_fewer_cells(self) -> None:
        model = make_detector(with_box_refine=True, two_stage="mixed", one_to_many=OneToMany(20, 3))
        counts = []
        for size in ((8, 8), (32, 32), (96, 96)):  # 4, 16 + 4 + 1 + 1, 193 cells
            outputs: dict[str, Any] = model(make_batch([size]))
            counts.append((outputs["pred_boxes"].shape[1], outputs["one_to_many"]["pred_boxes"].shape[1]))
        assert counts == [(4, 0), (12, 10), (12, 20)]


@pytest.mark.parametrize("two_stage", [True, "mixed"])
def test_two_stage_with_fewer_cells_than_queries(two_stage: Any) -> None:
    model = make_detector(num_queries=300, with_box_refine=True, two_stage=two_stage)
    outputs: dict[str, Any] = model(make_batch([(96, 96)]))
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
