import math
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from model.boxes import cxcywh_to_xyxy, generalized_iou
from model.config import CriterionConfig
from model.losses import matcher
from model.losses.class_loss import make_class_loss
from model.losses.groups import Group, Matches
from model.losses.matcher import match_all
from tests.builders import make_target

CONFIG = CriterionConfig()


def make_output(batch: int, queries: int, classes: int = 5, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(batch, queries, 4, generator=generator) * 0.5 + 0.1
    return {"pred_logits": torch.randn(batch, queries, classes, generator=generator), "pred_boxes": boxes}


def match(
    output: dict[str, Tensor], targets: list[dict[str, Tensor]], config: CriterionConfig, class_loss: str
) -> Matches:
    return match_all([Group(output, targets)], config, make_class_loss(class_loss, config))[0]


def pair_cost(logits: Tensor, box: Tensor, label: int, wanted: Tensor, class_loss: str) -> float:
    """Cost of one pair, from the definition."""
    if class_loss == "focal":
        p = logits[label].sigmoid().item()
        positive = 0.25 * (1 - p) ** 2 * -math.log(p)
        class_cost = positive - 0.75 * p**2 * -math.log(1 - p)
    else:
        class_cost = -logits.softmax(-1)[label].item()
    giou = generalized_iou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(wanted)).item()
    return 2 * class_cost + 5 * (box - wanted).abs().sum().item() - 2 * giou


@pytest.mark.parametrize("class_loss", ["focal", "softmax"])
@pytest.mark.parametrize("seed", range(3))
def test_least_cost_of_all_assignments(class_loss: str, seed: int) -> None:
    output, target = make_output(1, 5, seed=seed), make_target(3, num_classes=4, seed=seed)
    logits, boxes = output["pred_logits"][0], output["pred_boxes"][0]
    cost = [
        [pair_cost(logits[q], boxes[q], int(target["labels"][t]), target["boxes"][t], class_loss) for t in range(3)]
        for q in range(5)
    ]
    best = min(permutations(range(5), 3), key=lambda queries: sum(cost[q][t] for t, q in enumerate(queries)))
    query, matched = match(output, [target], CONFIG, class_loss)[0]
    assert {int(t): int(q) for q, t in zip(query, matched, strict=True)} == dict(enumerate(best))


def test_alpha_and_gamma_follow_the_loss() -> None:
    target = {"labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.21, 0.2]]])
    output = {"pred_logits": torch.tensor([[[-1.0], [1.0]]]), "pred_boxes": boxes}
    assert match(output, [target], CriterionConfig(bbox_weight=0.1, giou_weight=0), "focal")[0][0].tolist() == [1]
    # gamma 60 leaves next to no class cost, so the nearer box is taken
    sharp = CriterionConfig(bbox_weight=0.1, giou_weight=0, focal_gamma=60)
    assert match(output, [target], sharp, "focal")[0][0].tolist() == [0]


def test_the_class_cost_has_a_weight_of_its_own() -> None:
    target = {"labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.21, 0.2]]])
    output = {"pred_logits": torch.tensor([[[-1.0], [1.0]]]), "pred_boxes": boxes}
    assert match(output, [target], CriterionConfig(), "vfl")[0][0].tolist() == [1]
    assert match(output, [target], CriterionConfig(class_cost=0), "vfl")[0][0].tolist() == [0]
    assert match(output, [target], CriterionConfig(class_weight=0, class_cost=2), "vfl")[0][0].tolist() == [1]


def test_images_and_layers_do_not_mix() -> None:
    targets = [make_target(3), make_target(0), make_target(6, seed=1), make_target(1, seed=2)]
    outputs = [make_output(4, 9, seed=1), make_output(4, 40, seed=2), make_output(4, 9, seed=3)]
    groups = [Group(output, targets) for output in outputs]
    together = match_all(groups, CONFIG, make_class_loss("focal", CONFIG))
    for output, matches in zip(outputs, together, strict=True):
        for image, target in enumerate(targets):
            alone = {key: value[image : image + 1] for key, value in output.items()}
            expected = match(alone, [target], CONFIG, "focal")[0]
            assert [index.tolist() for index in matches[image]] == [index.tolist() for index in expected]
            assert len(matches[image][0]) == len(target["labels"])


@pytest.mark.parametrize(
    ("objects", "queries", "matched"),
    [
        pytest.param(0, 10, 0, id="no object"),
        pytest.param(400, 100, 100, id="400 objects"),
        pytest.param(10, 10, 10, id="as many"),
        pytest.param(1, 1, 1, id="one of each"),
    ],
)
def test_counts(objects: int, queries: int, matched: int) -> None:
    query, target = match(make_output(1, queries), [make_target(objects)], CONFIG, "focal")[0]
    assert len(query) == len(target) == matched
    assert len(set(query.tolist())) == len(set(target.tolist())) == matched


@pytest.mark.parametrize("place", ["pred_logits", "pred_boxes"])
def test_outputs_that_are_not_finite_are_left_to_the_finite_check(place: str) -> None:
    output = make_output(2, 6)
    output[place][0, 3] = float("nan")
    query, _ = match(output, [make_target(3), make_target(2)], CONFIG, "focal")[0]
    assert len(query) == 3
    assert 3 not in query.tolist()


def test_16_bit_outputs() -> None:
    output = {key: value.bfloat16() for key, value in make_output(1, 6).items()}
    assert len(match(output, [make_target(3)], CONFIG, "softmax")[0][0]) == 3


def test_groups_of_the_same_sizes_share_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    costs = matcher.matching_costs

    def counted(logits: Tensor, *rest: Any) -> Tensor:
        calls.append(tuple(logits.shape))
        return costs(logits, *rest)

    monkeypatch.setattr(matcher, "matching_costs", counted)
    targets, same, other = ([make_target(n, seed=seed)] for n, seed in ((2, 0), (2, 1), (3, 2)))
    given = [(torch.tensor([0]), torch.tensor([1]))]
    groups = [Group(make_output(1, 6, seed=1), targets), Group(make_output(1, 6, seed=2), same, "_1")]
    groups += [Group(make_output(1, 6, seed=3), other, "_2"), Group(make_output(1, 6), targets, "_3", given)]
    matches = match_all(groups, CONFIG, make_class_loss("focal", CONFIG))
    assert calls == [(2, 1, 6, 5), (1, 1, 6, 5)]
    assert matches[3] is given
    for group, found in zip(groups[:3], matches, strict=False):
        alone = match_all([group], CONFIG, make_class_loss("focal", CONFIG))[0]
        assert [index.tolist() for index in found[0]] == [index.tolist() for index in alone[0]]
