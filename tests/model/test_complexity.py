from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.complexity import MicroBatch, measure
from model.config import CriterionConfig, Denoising, DetrConfig, OneToMany
from model.denoising import DRAWS, add_noise
from model.losses.criterion import Criterion
from model.losses.groups import groups_of
from model.memory import LiveBytes, kept_for_backward
from model.ops import compiled, ms_deform_attn, operator
from model.recompute import recompute_activations
from tests.builders import make_batch, make_detector, make_target

DETR: dict[str, Any] = {
    "arch": "detr",
    "feature_levels": 1,
    "num_queries": 100,
    "ffn_dim": 2048,
    "class_loss": "softmax",
}
TWO_STAGE: dict[str, Any] = {"with_box_refine": True, "two_stage": True}


@pytest.mark.parametrize(
    ("settings", "published"),
    [  # arXiv 2010.04159, tables 1 and 3
        pytest.param({"feature_levels": 1}, 78, id="single-scale"),
        pytest.param({"feature_levels": 1, "dilation": True}, 128, id="single-scale-dc5"),
        pytest.param({}, 173, id="multi-scale"),
        pytest.param(TWO_STAGE, 173, id="two-stage"),
        pytest.param(DETR, 86, id="detr"),
    ],
)
def test_multiply_adds_are_the_published_ones(settings: dict[str, Any], published: int) -> None:
    assert measure(DetrConfig(**settings)).multiply_adds / 1e9 == pytest.approx(published, rel=0.03)


def test_parameters_and_tensors() -> None:
    complexity = measure(DetrConfig(), size=(64, 64))
    assert (complexity.parameters, complexity.trainable, complexity.tensors) == (40_069_665, 39_847_265, 561)
    assert measure(DetrConfig(), "none", (64, 64)).trainable == 40_069_665
    assert measure(DetrConfig(**TWO_STAGE), size=(64, 64)).tensors == 630


def test_mixed_queries_by_hand() -> None:
    two_stage = DetrConfig(**TWO_STAGE, backbone="resnet_tiny", num_queries=40, encoder_layers=0)
    mixed = replace(two_stage, two_stage="mixed", look_forward_twice=True)
    mine, theirs = (measure(config, size=(64, 64)) for config in (mixed, two_stage))
    contents, positions = 40 * 256, 512 * 256 + 256 + 2 * 256  # learned; no longer made by pos_trans and its norm
    assert mine.parameters - theirs.parameters == contents - positions
    assert theirs.multiply_adds - mine.multiply_adds == 40 * 512 * 256


def test_queries_of_training_cost_nothing_at_inference() -> None:
    plain = DetrConfig(
        backbone="resnet_tiny", hidden_dim=32, heads=4, ffn_dim=48, num_queries=40, feature_levels=1, encoder_layers=0,
        decoder_layers=1,
    )  # fmt: skip
    hybrid = replace(plain, one_to_many=OneToMany(60, 3))
    without, found = (measure(config, size=(64, 64)) for config in (plain, hybrid))
    assert found.multiply_adds == without.multiply_adds
    assert found.parameters - without.parameters == 60 * 64
    less, more, most = (
        MicroBatch(replace(plain, one_to_many=many and OneToMany(many, 3)), 1, (64, 64)).work().flops
        for many in (None, 60, 120)
    )
    linear = (more - less) / 60
    # Groups attend to themselves alone: 60 * 60 and 120 * 120 pairs of queries, not 100 * 100 and 160 * 160.
    attention = 2 * 3.5 * 2 * 32  # of a pair, forward and backward
    assert most - less == pytest.approx(2 * 60 * linear + attention * (120**2 - 2 * 60**2), rel=1e-9)


def test_a_small_detr_by_hand() -> None:
    config = DetrConfig(
        backbone="resnet_tiny", arch="detr", feature_levels=1, hidden_dim=32, heads=4, ffn_dim=48, num_queries=7,
        decoder_layers=1, num_classes=5,
    )  # fmt: skip
    one, two = (measure(replace(config, encoder_layers=layers), size=(64, 96)) for layers in (1, 2))
    cells = 2 * 3
    layer = cells * (4 * 32 * 32 + 2 * 32 * 48) + 2 * cells * cells * 32
    assert two.multiply_adds - one.multiply_adds == layer


def test_training_of_a_small_detr_by_hand() -> None:
    config = DetrConfig(
        backbone="resnet_tiny", arch="detr", feature_levels=1, hidden_dim=32, heads=4, ffn_dim=48, num_queries=7,
        decoder_layers=1, num_classes=5,
    )  # fmt: skip
    one, two = (MicroBatch(replace(config, encoder_layers=n), 2, (64, 96), frozen="none").work() for n in (1, 2))
    cells = 2 * 3
    products, attention = cells * (4 * 32 * 32 + 2 * 32 * 48), 2 * cells * cells * 32
    # Twice the forward pass backwards, and fused attention computes its weights again.
    layer = 2 * (3 * products + 3.5 * attention)
    assert two.flops - one.flops == 2 * layer
    assert two.conv_flops == one.conv_flops, "no convolutions"


@pytest.mark.parametrize("backbone", ["swin_nano", "vit_nano"])
def test_a_transformer_counts_as_real_tensors_do(backbone: str) -> None:
    if not compiled():
        pytest.skip("there are no kernels here")
    model = make_detector(backbone=backbone, backbone_norm="frozen_batch_norm").eval().requires_grad_(False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(make_batch([(96, 128)]))
    assert measure(model.config, size=(96, 128)).multiply_adds == counter.get_total_flops() // 2


def test_what_is_frozen_has_no_backward_pass() -> None:
    batch = MicroBatch(DetrConfig(), 1, (64, 96), frozen="none")
    forward = 2 * measure(DetrConfig(), size=(64, 96)).multiply_adds
    flops = [replace(batch, frozen=frozen).work().flops / forward for frozen in ("none", "stem_and_layer1", "all")]
    assert 3.1 > flops[0] > flops[1] > flops[2] > 2
    assert replace(batch, recompute=True).work().flops == pytest.approx(flops[0] * forward + 0.9 * forward, rel=0.1)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"feature_levels": 4, "encoder_layers": 2}, id="base"),
        pytest.param(TWO_STAGE, id="two-stage"),
        pytest.param({"with_box_refine": True, "two_stage": "mixed", "look_forward_twice": True}, id="mixed"),
        pytest.param({"one_to_many": OneToMany(20, 3)}, id="hybrid"),
        pytest.param({**TWO_STAGE, "denoising": Denoising(40)}, id="denoising"),
        pytest.param({"arch": "detr"}, id="detr"),
        pytest.param({"backbone": "resnet18", "backbone_norm": "frozen_batch_norm"}, id="frozen"),
        pytest.param({"backbone": "swin_nano", "backbone_norm": "frozen_batch_norm"}, id="swin"),
        pytest.param({"backbone": "vit_nano", "backbone_norm": "frozen_batch_norm"}, id="vit"),
    ],
)
def test_memory_of_training_is_that_of_real_tensors(settings: dict[str, Any], recompute: bool) -> None:
    model = make_detector(**settings, dropout=0.0).train()
    model.backbone.freeze("stem_and_layer1")
    recompute_activations(model, recompute)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    size = (160, 192)
    batch, targets = make_batch([size, size]), [make_target(7), make_target(7)]
    with LiveBytes() as live:
        with kept_for_backward([*model.parameters(), *model.buffers()]) as kept:
            noised = None
            if model.config.denoising is not None:
                noised = add_noise(targets, model.config.denoising, 5, np.zeros((2, 40, DRAWS)))
            outputs = model(batch) if noised is None else model(batch, noised)
            groups = groups_of(outputs, targets, model.config.one_to_many, noised)
            loss = Criterion(CriterionConfig(), model.config.class_loss)(groups, 14.0, 2).total()
        real = sum(kept.values())
        del groups
        loss.backward()
    counted, peak = MicroBatch(model.config, 2, size, recompute=recompute).memory()
    assert counted == pytest.approx(real, rel=0.02)
    assert peak == pytest.approx(live.peak, rel=0.05)


def test_bf16_keeps_less() -> None:
    batch = MicroBatch(DetrConfig(), 2, (640, 640))  # of a small one the copies of the weights are most
    assert replace(batch, autocast=torch.bfloat16).memory()[0] < 0.7 * batch.memory()[0]
    assert replace(batch, autocast=torch.bfloat16).work().flops == batch.work().flops
    assert replace(batch, autocast=torch.bfloat16).work().moved < 0.8 * batch.work().moved


def test_plain_torch_counts_as_much_as_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled():
        pytest.skip("there are no kernels here")
    with_kernels, training = measure(DetrConfig(), size=(256, 256)), MicroBatch(DetrConfig(), 1, (64, 64)).work().flops
    monkeypatch.setattr(operator, "compiled", lambda device="cpu": False)
    monkeypatch.setattr(operator, "_warn_once", lambda: None)
    assert measure(DetrConfig(), size=(256, 256)) == with_kernels
    assert MicroBatch(DetrConfig(), 1, (64, 64)).work().flops == training


def test_any_counter_knows_the_operator() -> None:
    if not compiled():
        pytest.skip("there are no kernels here")
    value, locations, weights = torch.rand(2, 6, 4, 8), torch.rand(2, 3, 4, 1, 5, 2), torch.rand(2, 3, 4, 1, 5)
    with FlopCounterMode(display=False) as counter:
        ms_deform_attn(value, [(2, 3)], locations, weights)
    assert counter.get_total_flops() == 2 * 5 * (2 * 3 * 4 * 5) * 8
