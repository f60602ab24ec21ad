"""In bf16 the network's weights and activations have 16 bits; coordinates, codes, matching and losses have 32."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from model import deformable_attention as attention
from model import deformable_transformer as transformer
from model import detr
from model.config import CriterionConfig
from model.losses import matcher
from model.losses.criterion import Criterion
from model.losses.groups import groups_of
from tests.builders import make_batch, make_detector, make_target

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "refine": {"with_box_refine": True},
    "two-stage": {"with_box_refine": True, "two_stage": True},
    "softmax": {"class_loss": "softmax"},
    "frozen norms": {"backbone_norm": "frozen_batch_norm"},
    "detr": {"arch": "detr"},
    "swin": {"backbone": "swin_nano", "backbone_norm": "frozen_batch_norm"},
    "vit": {"backbone": "vit_nano", "backbone_norm": "frozen_batch_norm"},
}
PLACES = (
    (transformer, "encode_cells"),
    (transformer, "encode_boxes"),
    (transformer, "valid_ratio"),
    (transformer, "encoder_reference_points"),
    (transformer, "proposal_anchors"),
    (transformer, "relative_boxes"),
    (attention.MSDeformAttn, "_locations"),
    (detr, "encode_cells"),
    (matcher, "matching_costs"),
)
"""Where coordinates, codes and costs are made."""

every_variant = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
both_ways = pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])


def make_model(autocast: bool, **settings: Any) -> Any:
    model = make_detector(dropout=0.0, **settings)
    with torch.no_grad():  # weights that are zero at first would hide errors
        for index, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.add_(0.02 * noise)
    return model if autocast else model.bfloat16()


def precision(autocast: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()


def types(value: Any) -> set[torch.dtype]:
    leaves = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return {leaf.dtype for leaf in leaves if leaf.is_floating_point()}


def recorded(function: Any, seen: dict[str, set[torch.dtype]]) -> Any:
    """`function`, which notes the types of its results under its name."""

    def record(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        seen.setdefault(function.__name__, set()).update(types(result))
        return result

    return record


@every_variant
@both_ways
def test_coordinates_and_losses_are_fp32(
    settings: dict[str, Any], autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[torch.dtype]] = {}
    for owner, name in PLACES:
        monkeypatch.setattr(owner, name, recorded(getattr(owner, name), seen))
    model = make_model(autocast, **settings)
    activations: set[torch.dtype] = set()
    model.transformer.decoder.layers[0].linear1.register_forward_hook(lambda *call: activations.update(types(call[-1])))
    criterion = Criterion(CriterionConfig(), model.config.class_loss)
    with precision(autocast):
        outputs = model(make_batch())
        losses = criterion(groups_of(outputs, [make_target(3), make_target(2, seed=1)]), 5.0).values
    assert activations == {torch.bfloat16}
    assert types((outputs, losses)) == {torch.float32}
    expected = {"encode_cells", "matching_costs"}
    if model.config.arch == "deformable_detr":
        expected |= {"valid_ratio", "encoder_reference_points", "relative_boxes", "_locations"}
    if model.config.two_stage:
        expected |= {"encode_boxes", "proposal_anchors"}
    assert seen == {name: {torch.float32} for name in expected}


@every_variant
@both_ways
def test_outputs_are_near_those_in_fp32(settings: dict[str, Any], autocast: bool) -> None:
    exact, model = make_model(True, **settings), make_model(autocast, **settings)
    with precision(autocast):
        outputs = model(make_batch())
    expected = exact(make_batch())
    # A proposal may rank otherwise: what every cell says is compared then.
    place = "enc_outputs" if model.config.two_stage else None
    ours, theirs = (outputs[place], expected[place]) if place else (outputs, expected)
    assert not torch.equal(ours["pred_logits"], theirs["pred_logits"])
    torch.testing.assert_close(ours["pred_logits"], theirs["pred_logits"], rtol=0, atol=0.1)
    torch.testing.assert_close(ours["pred_boxes"], theirs["pred_boxes"], rtol=0, atol=0.01)


@every_variant
@both_ways
def test_gradients_are_finite(settings: dict[str, Any], autocast: bool) -> None:
    model = make_model(autocast, **settings)
    criterion = Criterion(CriterionConfig(), model.config.class_loss)
    with precision(autocast):
        losses = criterion(groups_of(model(make_batch()), [make_target(3), make_target(0)]), 3.0)
    losses.total().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_large_coordinates_keep_their_digits() -> None:
    """bf16 would round the centre of a cell of a map of 167 cells by up to a third of a cell."""
    masks = [torch.zeros(1, 3, 167, dtype=torch.bool)]
    ratios = torch.stack([transformer.valid_ratio(mask, torch.float32) for mask in masks], dim=1)
    points = transformer.encoder_reference_points([(3, 167)], ratios)[0, :167, 0, 0] * 167
    torch.testing.assert_close(points, torch.arange(167) + 0.5, rtol=0, atol=1e-4)
