"""model/losses/class_loss.py: each loss by its definition; matching, criterion and ranking are tested beside theirs."""

import math

import pytest
import torch
from torch import Tensor

from model.config import CriterionConfig
from model.losses.class_loss import FocalLoss, Matched, SoftmaxLoss, make_class_loss

LOGITS = torch.tensor([[[2.0, -1.0, 1.5], [-3.0, 3.0, 0.0]]])


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
    with pytest.raises(ValueError, match='class_loss is "sigmoid", it must be focal or softmax'):
        make_class_loss("sigmoid")
