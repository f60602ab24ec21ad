from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.complexity import measure
from model.config import DetrConfig
from model.ops import compiled, ms_deform_attn, operator

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


def test_a_small_detr_by_hand() -> None:
    config = DetrConfig(
        backbone="resnet_tiny", arch="detr", feature_levels=1, hidden_dim=32, heads=4, ffn_dim=48, num_queries=7,
        decoder_layers=1, num_classes=5,
    )  # fmt: skip
    one, two = (measure(replace(config, encoder_layers=layers), size=(64, 96)) for layers in (1, 2))
    cells = 2 * 3
    layer = cells * (4 * 32 * 32 + 2 * 32 * 48) + 2 * cells * cells * 32
    assert two.multiply_adds - one.multiply_adds == layer


def test_plain_torch_counts_as_much_as_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled():
        pytest.skip("there are no kernels here")
    with_kernels = measure(DetrConfig(), size=(256, 256))
    monkeypatch.setattr(operator, "compiled", lambda device="cpu": False)
    monkeypatch.setattr(operator, "_warn_once", lambda: None)
    assert measure(DetrConfig(), size=(256, 256)) == with_kernels


def test_any_counter_knows_the_operator() -> None:
    if not compiled():
        pytest.skip("there are no kernels here")
    value, locations, weights = torch.rand(2, 6, 4, 8), torch.rand(2, 3, 4, 1, 5, 2), torch.rand(2, 3, 4, 1, 5)
    with FlopCounterMode(display=False) as counter:
        ms_deform_attn(value, [(2, 3)], locations, weights)
    assert counter.get_total_flops() == 2 * 5 * (2 * 3 * 4 * 5) * 8
