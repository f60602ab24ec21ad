"""model/losses/class_loss.py: each loss by its definition; matching, criterion and ranking are tested beside theirs."""

import math

import pytest
import torch
from torch import Tensor

from model.config import CriterionConfig
from model.losses.class_loss import (
    FocalLoss,
    IouAwareLoss,
    MatchabilityAwareLoss,
    Matched,
    SoftmaxLoss,
    VarifocalLoss,
    make_class_loss,
)

LOGITS = torch.tensor([[[2.0, -1.0, 1.5], [-3.0, 3.0, 0.0]]])
OVERLAP = {(0, 1): 1 / 3, (1, 0): 0.0}
"""IoU of the matched pairs of a query and a class in `TestThoseThatLookAtTheBoxes`."""


def matched(query: int, label: int) -> Matched:
    """One pair of the first image."""
    box = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    return Matched(torch.tensor([0]), torch.tensor([query]), torch.tensor([label]), box, box)


def nothing() -> Matched:
    none = torch.empty(0, dtype=torch.int64)
    return Matched(none, none, none, torch.empty(0, 4), torch.empty(0, 4))


def cross_entropy(logits: Tensor, label: int) -> float:
    return -math.log(logits.softmax(-1)[label].item())


class TestFocal:
    loss = FocalLoss(alpha=0.25, gamma=2.0)

    def test_cost_is_the_change_of_the_loss(self) -> None:
        labels = torch.tensor([[[[0, 1], [0, 1]]]])
        costs = self.loss.cost(LOGITS[None], labels)
        one = torch.tensor(1.0)
        without = self.loss.loss(LOGITS, nothing(), one, 1)
        for query in range(2):
            for label in range(2):
                change = self.loss.loss(LOGITS, matched(query, label), one, 1) - without
                torch.testing.assert_close(costs[0, 0, query, label], change)

    def test_objects_are_at_least_one(self) -> None:
        sums = [self.loss.loss(LOGITS, matched(0, 1), torch.tensor(n), 1).item() for n in (0.0, 1.0, 4.0)]
        assert sums[0] == sums[1] == pytest.approx(4 * sums[2])

    def test_a_query_may_give_two_classes(self) -> None:
        scores, labels, queries = self.loss.scores(LOGITS, 3)
        assert (labels.tolist(), queries.tolist()) == ([[1, 0, 2]], [[1, 0, 0]])
        torch.testing.assert_close(scores, torch.tensor([[3.0, 2.0, 1.5]]).sigmoid())

    def test_bias_is_a_probability_of_a_hundredth(self) -> None:
        assert torch.tensor(self.loss.bias).sigmoid().item() == pytest.approx(0.01)


class TestThoseThatLookAtTheBoxes:
    """Query 0 has an object of class 1 with an IoU of 1/3, query 1 one of class 0 without overlap."""

    pairs = Matched(
        torch.tensor([0, 0]),
        torch.tensor([0, 1]),
        torch.tensor([1, 0]),
        torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]], dtype=torch.float64, requires_grad=True),
        torch.tensor([[0.6, 0.5, 0.2, 0.2], [0.9, 0.9, 0.1, 0.1]], dtype=torch.float64),
    )

    def value_and_gradient(self, loss: FocalLoss) -> tuple[float, Tensor]:
        logits = LOGITS.double().requires_grad_()
        value = loss.loss(logits, self.pairs, torch.tensor(2.0), 1)
        value.backward()
        assert logits.grad is not None
        assert self.pairs.predicted.grad is None, "the boxes are not trained by it"
        return value.item(), logits.grad[0]

    def test_varifocal(self) -> None:
        found, gradient = self.value_and_gradient(VarifocalLoss(0.25, 2.0, 0.75))
        value = 0.0
        for query, row in enumerate(LOGITS[0].tolist()):
            for label, x in enumerate(row):
                p, q = 1 / (1 + math.exp(-x)), OVERLAP.get((query, label))
                weight, wanted = (0.75 * p**2, 0.0) if q is None else (q, q)
                value -= weight * (wanted * math.log(p) + (1 - wanted) * math.log(1 - p)) / 2
                assert gradient[query, label].item() == pytest.approx(weight * (p - wanted) / 2, rel=1e-6)
        assert found == pytest.approx(value, rel=1e-6)

    def test_iou_aware(self) -> None:
        found, gradient = self.value_and_gradient(IouAwareLoss(0.25, 2.0, 0.25))
        value = 0.0
        for query, row in enumerate(LOGITS[0].tolist()):
            for label, x in enumerate(row):
                p, overlap = 1 / (1 + math.exp(-x)), OVERLAP.get((query, label))
                if overlap is None:
                    value -= p**2 * math.log(1 - p) / 2
                    slope = 2 * p**2 * (1 - p) * -math.log(1 - p) + p**3
                else:
                    t = max(0.01, p**0.25 * overlap**0.75)
                    value -= (t * math.log(p) + (1 - t) * math.log(1 - p)) / 2
                    slope = p - t
                assert gradient[query, label].item() == pytest.approx(slope / 2, rel=1e-6)
        assert found == pytest.approx(value, rel=1e-6)

    def test_matchability_aware(self) -> None:
        found, gradient = self.value_and_gradient(MatchabilityAwareLoss(0.25, 2.0, 1.5))
        value, slopes = 0.0, torch.zeros_like(gradient)
        for query, row in enumerate(LOGITS[0].tolist()):
            for label, x in enumerate(row):
                p, q = 1 / (1 + math.exp(-x)), OVERLAP.get((query, label))
                weight, wanted = (p**1.5, 0.0) if q is None else (1.0, q**1.5)
                value -= weight * (wanted * math.log(p) + (1 - wanted) * math.log(1 - p)) / 2
                slopes[query, label] = weight * (p - wanted) / 2
        assert found == pytest.approx(value, rel=1e-12)
        assert (gradient - slopes).norm() <= 1e-8 * slopes.norm()

    @pytest.mark.parametrize(
        "loss", [VarifocalLoss(0.25, 2.0, 0.75), IouAwareLoss(0.25, 2.0, 0.25), MatchabilityAwareLoss(0.25, 2.0, 1.5)]
    )
    def test_all_else_is_the_focal_losss(self, loss: FocalLoss) -> None:
        focal, labels = FocalLoss(0.25, 2.0), torch.tensor([[[[0, 1], [0, 1]]]])
        assert loss.bias == focal.bias
        assert torch.equal(loss.cost(LOGITS[None], labels), focal.cost(LOGITS[None], labels))
        for found, expected in zip(loss.scores(LOGITS, 3), focal.scores(LOGITS, 3), strict=True):
            assert torch.equal(found, expected)
        assert loss.loss(LOGITS, nothing(), torch.tensor(0.0), 1) > 0


class TestSoftmax:
    loss = SoftmaxLoss(no_object=0.1)

    def test_cost_is_the_probability(self) -> None:
        costs = self.loss.cost(LOGITS[None], torch.tensor([[[[1], [1]]]]))
        torch.testing.assert_close(costs[0, 0, :, 0], -LOGITS.softmax(-1)[0, :, 1])

    def test_loss_is_a_weighted_mean(self) -> None:
        found = self.loss.loss(LOGITS, matched(1, 0), torch.tensor(1.0), 1).item()
        terms = cross_entropy(LOGITS[0, 1], 0) + 0.1 * cross_entropy(LOGITS[0, 0], 2)
        assert found == pytest.approx(terms / 1.1, rel=1e-5)

    def test_a_query_gives_its_best_class_but_no_object(self) -> None:
        scores, labels, queries = self.loss.scores(LOGITS, 5)
        assert (labels.tolist(), queries.tolist()) == ([[1, 0]], [[1, 0]])
        torch.testing.assert_close(scores[0], LOGITS.softmax(-1)[0, [1, 0], [1, 0]])

    def test_no_prior(self) -> None:
        assert self.loss.bias is None


def test_by_name() -> None:
    config = CriterionConfig(focal_alpha=0.5, focal_gamma=1.0, no_object_weight=0.3)
    assert make_class_loss("focal", config) == FocalLoss(0.5, 1.0)
    assert make_class_loss("softmax", config) == SoftmaxLoss(0.3)
    assert make_class_loss("focal") == FocalLoss(0.25, 2.0)
    assert make_class_loss("vfl") == VarifocalLoss(0.25, 2.0, 0.75)
    assert make_class_loss("ia_bce") == IouAwareLoss(0.25, 2.0, 0.25)
    assert make_class_loss("ma") == MatchabilityAwareLoss(0.25, 2.0, 1.5)
    ours = CriterionConfig(focal_alpha=0.5, focal_gamma=1.0, vfl_alpha=0.6, ia_bce_alpha=0.1, ma_gamma=1.2)
    assert make_class_loss("vfl", ours) == VarifocalLoss(0.5, 1.0, 0.6)
    assert make_class_loss("ia_bce", ours) == IouAwareLoss(0.5, 1.0, 0.1)
    assert make_class_loss("ma", ours) == MatchabilityAwareLoss(0.5, 1.0, 1.2)
    with pytest.raises(ValueError, match='class_loss is "sigmoid", it must be focal, vfl, ia_bce, ma or softmax'):
        make_class_loss("sigmoid")
