from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.config import DetrConfig
from model.deformable_attention import make_levels
from model.deformable_detr import DeformableDetr
from model.deformable_transformer import (
    Decoder,
    Transformer,
    encoder_reference_points,
    proposal_anchors,
    relative_boxes,
    valid_ratio,
)
from model.init import init_weights
from model.position import encode_boxes

SHAPES = [(6, 8), (3, 4)]


def make_masks() -> list[Tensor]:
    """Of two images, the second with 4 of 6 rows and 6 of 8 columns."""
    masks = [torch.zeros(2, height, width, dtype=torch.bool) for height, width in SHAPES]
    for mask in masks:
        mask[1, 2 * mask.shape[1] // 3 :] = True
        mask[1, :, 3 * mask.shape[2] // 4 :] = True
    return masks


def make_detector(**settings: object) -> DeformableDetr:
    """A small detector in fp64 whose zero weights have been moved, so that every path matters."""
    torch.manual_seed(0)
    small = {"backbone": "resnet_tiny", "backbone_norm": "group_norm", "hidden_dim": 32, "heads": 4, "ffn_dim": 48}
    config = DetrConfig(**small, feature_levels=4, num_queries=7, num_classes=5, dropout=0.0, **settings)  # type: ignore[arg-type]
    model = DeformableDetr(config)
    init_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.double()


def run(model: DeformableDetr, features: list[Tensor], masks: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Hidden states and boxes of all decoder layers."""
    query_embed = model.query_embed.weight if model.config.query_width else None
    out = model.transformer(features, masks, query_embed, model.class_embed, model.bbox_embed)
    return torch.stack(out.hidden), torch.stack(out.boxes)


def test_valid_ratio_is_width_then_height() -> None:
    ratio = valid_ratio(make_masks()[0], torch.float64)
    torch.testing.assert_close(ratio, torch.tensor([[1.0, 1.0], [3 / 4, 2 / 3]], dtype=torch.float64))


def test_encoder_reference_points_by_hand() -> None:
    ratios = torch.tensor([[[0.75, 0.5], [0.5, 1.0]]], dtype=torch.float64)
    points = encoder_reference_points(SHAPES, ratios)
    assert points.shape == (1, 60, 2, 2)
    x, y = (5 + 0.5) / (0.75 * 8), (2 + 0.5) / (0.5 * 6)  # row 2, column 5 of the first level
    expected = torch.tensor([[x * 0.75, y * 0.5], [x * 0.5, y * 1.0]], dtype=torch.float64)
    torch.testing.assert_close(points[0, 2 * 8 + 5], expected)


def test_a_cell_looks_at_its_own_centre() -> None:
    points = encoder_reference_points([(6, 8)], torch.ones(1, 1, 2))
    torch.testing.assert_close(points[0, 8 + 3, 0], torch.tensor([3.5 / 8, 1.5 / 6]))


def test_boxes_are_relative_to_their_reference() -> None:
    deltas = torch.tensor([[[0.0, 0.0, -2.0, 1.0]]])
    point = torch.tensor([[[0.3, 0.8]]])
    sizes = torch.tensor([-2.0, 1.0]).sigmoid()
    torch.testing.assert_close(relative_boxes(deltas, point)[0, 0], torch.cat((point[0, 0], sizes)))
    box = torch.tensor([[[0.3, 0.8, 0.1, 0.2]]])
    torch.testing.assert_close(relative_boxes(torch.zeros(1, 1, 4), box), box)
    assert torch.isfinite(relative_boxes(deltas, torch.tensor([[[0.0, 1.0]]]))).all()


def test_proposals_by_hand() -> None:
    logits, usable = proposal_anchors(make_masks(), torch.float64)
    boxes = logits.sigmoid()
    centre = [(1 + 0.5) / 6, (2 + 0.5) / 4]  # of the second image, whose valid part is 6 wide and 4 high
    torch.testing.assert_close(boxes[1, 2 * 8 + 1].tolist(), [*centre, 0.05, 0.05])
    torch.testing.assert_close(boxes[0, 48, 2:], torch.full((2,), 0.1, dtype=torch.float64))
    assert usable[0].all()
    assert usable[1, :48, 0].view(6, 8)[:4, :6].all()
    assert usable[1].sum() == 4 * 6 + 2 * 3


def test_proposals_at_the_border_are_not_usable() -> None:
    _, usable = proposal_anchors([torch.zeros(1, 2, 60, dtype=torch.bool)], torch.float32)
    assert usable.view(2, 60).logical_not().nonzero().tolist() == [[0, 0], [0, 59], [1, 0], [1, 59]]


@pytest.mark.parametrize(
    "settings",
    [{}, {"with_box_refine": True}, *({"with_box_refine": True, "two_stage": kind} for kind in (True, "mixed"))],
    ids=["base", "refine", "two-stage", "mixed"],
)
def test_padded_cells_do_not_matter(settings: dict[str, Any]) -> None:
    model = make_detector(encoder_layers=2, decoder_layers=2, **settings)
    shapes = [*SHAPES, (2, 2), (1, 1)]
    masks = [*make_masks(), torch.zeros(2, 2, 2, dtype=torch.bool), torch.zeros(2, 1, 1, dtype=torch.bool)]
    features = [torch.randn(2, 32, h, w, dtype=torch.float64) for h, w in shapes]
    expected = run(model, features, masks)
    changed = [feature.masked_fill(mask[:, None], 9.0) for feature, mask in zip(features, masks, strict=True)]
    torch.testing.assert_close(run(model, changed, masks), expected)
    assert not torch.allclose(run(model, [feature + 1 for feature in features], masks)[0], expected[0])


def test_refinement_starts_from_the_boxes_before_without_their_gradient() -> None:
    model = make_detector(encoder_layers=0, decoder_layers=2, with_box_refine=True)
    features = [torch.randn(1, 32, h, w, dtype=torch.float64) for h, w in [*SHAPES, (2, 2), (1, 1)]]
    masks = [torch.zeros(1, *feature.shape[2:], dtype=torch.bool) for feature in features]
    with torch.no_grad():  # a last head that says "no change" repeats the boxes of the first
        model.bbox_embed[1].layers[-1].weight.zero_()  # type: ignore[union-attr]
        model.bbox_embed[1].layers[-1].bias.zero_()  # type: ignore[union-attr]
    boxes = run(model, features, masks)[1]
    torch.testing.assert_close(boxes[1], boxes[0])
    boxes[1].sum().backward()
    first: Tensor = model.bbox_embed[0].layers[-1].bias  # type: ignore[union-attr, assignment]
    assert first.grad is None or not first.grad.any()


@pytest.mark.parametrize("two_stage", [False, True])
def test_looking_forward_twice_trains_the_layer_before_and_changes_no_number(two_stage: bool) -> None:
    settings: dict[str, Any] = {"decoder_layers": 3, "with_box_refine": True, "two_stage": two_stage}
    once, twice = (make_detector(encoder_layers=0, look_forward_twice=twice, **settings) for twice in (False, True))
    twice.load_state_dict(once.state_dict())
    features = [torch.randn(1, 32, h, w, dtype=torch.float64) for h, w in [*SHAPES, (2, 2), (1, 1)]]
    masks = [torch.zeros(1, *feature.shape[2:], dtype=torch.bool) for feature in features]
    with torch.no_grad():  # boxes of the last layer that repeat those of the one before pass their gradient on whole
        for model in (once, twice):
            model.bbox_embed[2].layers[-1].weight.zero_()  # type: ignore[union-attr]
            model.bbox_embed[2].layers[-1].bias.zero_()  # type: ignore[union-attr]
    assert torch.equal(run(once, features, masks)[1], run(twice, features, masks)[1])
    biases: list[Tensor] = [head.layers[-1].bias for head in twice.bbox_embed]  # type: ignore[union-attr, misc]
    boxes = run(twice, features, masks)[1]
    before = torch.autograd.grad(boxes[1].sum(), biases[:2], retain_graph=True)
    last = torch.autograd.grad(boxes[2].sum(), biases[:2])
    assert not last[0].any(), "two corrections back"
    torch.testing.assert_close(last[1], before[1])
    assert before[0].abs().sum() > 0


def test_mixed_queries_have_the_position_of_a_proposal_and_a_content_of_their_own() -> None:
    model = make_detector(with_box_refine=True, two_stage="mixed", decoder_layers=1)
    features = [torch.randn(2, 32, h, w, dtype=torch.float64) for h, w in [*SHAPES, (2, 2), (1, 1)]]
    seen: list[tuple[Tensor, ...]] = []
    model.transformer.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    run(model, features, [*make_masks(), *(torch.zeros(2, *f.shape[2:], dtype=torch.bool) for f in features[2:])])
    target, position, reference = seen[0][:3]
    assert torch.equal(target, model.query_embed.weight.expand(2, -1, -1))
    transformer = model.transformer
    expected = transformer.pos_trans_norm(transformer.pos_trans(encode_boxes(reference, 16)))
    torch.testing.assert_close(position, expected)
    assert not torch.equal(position[0], position[1])


def test_shared_reference_without_refinement_keeps_its_gradient() -> None:
    model = make_detector(encoder_layers=0, decoder_layers=2)
    features = [torch.randn(1, 32, h, w, dtype=torch.float64) for h, w in [*SHAPES, (2, 2), (1, 1)]]
    masks = [torch.zeros(1, *feature.shape[2:], dtype=torch.bool) for feature in features]
    run(model, features, masks)[1][-1].sum().backward()
    grad = model.transformer.reference_points.weight.grad
    assert grad is not None
    assert grad.abs().sum() > 0


def test_level_embedding_tells_levels_apart() -> None:
    """Two levels of the same shape and content exchange their memory only together with their embeddings."""
    config = DetrConfig(hidden_dim=32, heads=4, ffn_dim=48, feature_levels=3, encoder_layers=1, decoder_layers=1)
    torch.manual_seed(0)
    transformer = Transformer(config)
    nn.init.normal_(transformer.level_embed)
    seen: list[Tensor] = []
    transformer.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    features = [torch.randn(1, 32, 2, 2)] * 3
    masks = [torch.zeros(1, 2, 2, dtype=torch.bool)] * 3
    heads = nn.ModuleList([nn.Linear(32, 4)])
    transformer(features, masks, torch.randn(5, 64), heads, heads)
    position = seen[0].view(3, 4, 32)
    shift = transformer.level_embed[1] - transformer.level_embed[0]
    torch.testing.assert_close(position[1] - position[0], shift.expand(4, -1))


def test_order_of_the_decoders_norms() -> None:
    """Self-attention is followed by norm2, cross-attention by norm1, the feed-forward block by norm3."""
    torch.manual_seed(0)
    layer = Decoder(DetrConfig(hidden_dim=32, heads=4, ffn_dim=48, feature_levels=1, decoder_layers=1)).layers[0]
    order: list[str] = []
    for name, module in layer.named_children():
        module.register_forward_hook(lambda *_, name=name: order.append(name))
    query, reference = torch.randn(1, 3, 32), torch.rand(1, 3, 1, 2)
    levels, padding = make_levels([(2, 2)], query), torch.zeros(1, 4, dtype=torch.bool)
    layer(query, query, reference, torch.randn(1, 4, 32), levels, padding)
    kept = [name for name in order if "dropout" not in name]
    assert kept == ["self_attn", "norm2", "cross_attn", "norm1", "linear1", "linear2", "norm3"]
