"""The class losses: what each asks of the matching, of training, of the initial weights and of the ranking.

A further loss is a further class here and a name in `make_class_loss`; nobody else knows which one is in use.
Shapes: B batch, Q queries, C logits, N objects, K outputs that are matched at once.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.boxes import cxcywh_to_xyxy, iou
from model.config import CriterionConfig


@dataclass(frozen=True)
class Matched:
    """The pairs of a query and its object in a batch."""

    image: Tensor
    """[matched], index of the image."""
    query: Tensor
    """[matched], index of the query."""
    labels: Tensor
    """[matched], the objects' classes."""
    predicted: Tensor
    """[matched, 4] cxcywh, the queries' boxes, for losses that weigh by overlap."""
    wanted: Tensor
    """[matched, 4] cxcywh, the objects' boxes."""

    def overlap(self) -> Tensor:
        """IoU [matched] of the pairs, without a gradient."""
        return iou(cxcywh_to_xyxy(self.predicted.detach()), cxcywh_to_xyxy(self.wanted))


class ClassLoss(Protocol):
    """A class loss. Logits are fp32, or fp64 where the model is."""

    @property
    def bias(self) -> float | None:
        """Initial bias of the class head; None leaves it as the detector's other heads have it."""

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What the matching pays for giving `labels` `[K, B, Q, N]` to queries with `logits` `[K, B, Q, C]`."""

    def loss(self, logits: Tensor, matched: Matched, objects: Tensor, num_images: float) -> Tensor:
        """The normalised loss of an output.

        Args:
            logits: `[B, Q, C]`.
            matched: which queries have an object; all others have none.
            objects: number of objects of the global batch, a scalar.
            num_images: number of images of the global batch.
        """

    def scores(self, logits: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scores in falling order, labels and queries, `[B, k]` each, of the `top` best of `logits` `[B, Q, C]`."""


@dataclass(frozen=True)
class FocalLoss:
    """The sigmoid focal loss (arXiv 1708.02002, equation 5), one logit a class.

    A detection is a pair of a query and a class, so a query may give more than one.
    """

    alpha: float
    """Weight of the positive term."""
    gamma: float
    """Focusing exponent."""

    @property
    def bias(self) -> float:
        """Nearly all classes are absent: each starts at a probability of 0.01."""
        return -math.log(99)

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The change of the loss when a query turns from background to the object's class."""
        chosen = logits.gather(-1, labels)
        probability = chosen.sigmoid()
        positive = self.alpha * (1 - probability).pow(self.gamma) * F.softplus(-chosen)
        negative = (1 - self.alpha) * probability.pow(self.gamma) * F.softplus(chosen)
        return positive - negative

    def loss(self, logits: Tensor, matched: Matched, objects: Tensor, num_images: float) -> Tensor:
        """The sum over all logits by the number of objects; the original's mean over queries times their number."""
        wanted = torch.zeros_like(logits)
        wanted[matched.image, matched.query, matched.labels] = 1.0
        entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        probability = logits.sigmoid()
        missed = probability + wanted - 2 * probability * wanted  # 1 - probability of the right answer
        weight = self.alpha * wanted + (1 - self.alpha) * (1 - wanted)
        return (weight * missed.pow(self.gamma) * entropy).sum() / objects.clamp(min=1)

    def scores(self, logits: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best pairs of a query and a class."""
        probabilities = logits.sigmoid().flatten(1)  # [B, Q * C]
        scores, index = probabilities.topk(min(top, probabilities.shape[1]), dim=1)
        return scores, index % logits.shape[-1], index // logits.shape[-1]


@dataclass(frozen=True)
class VarifocalLoss(FocalLoss):
    """The varifocal loss (arXiv 2008.13367, equation 2): a query's object wants its IoU as the score.

    A logit x with the wanted score q = IoU costs q * BCE(x, q), any other alpha * sigmoid(x)^gamma * BCE(x, 0), whose
    weight passes no gradient on. Matched, ranked and begun as under the focal loss: RT-DETR (arXiv 2304.08069), with
    the same normaliser.
    """

    negative_alpha: float
    """Weight of the logits without an object."""

    def loss(self, logits: Tensor, matched: Matched, objects: Tensor, num_images: float) -> Tensor:
        """The sum over all logits by the number of objects."""
        place = matched.image, matched.query, matched.labels
        wanted = torch.zeros_like(logits)
        wanted[place] = matched.overlap()
        weight = self.negative_alpha * logits.detach().sigmoid().pow(self.gamma)
        weight[place] = wanted[place]
        entropy = F.binary_cross_entropy_with_logits(logits, wanted, weight, reduction="sum")
        return entropy / objects.clamp(min=1)


@dataclass(frozen=True)
class IouAwareLoss(FocalLoss):
    """The IoU-aware cross-entropy IA-BCE of Align-DETR (arXiv 2304.07527; FelixCaae/AlignDETR, `IA_BCE_loss`).

    A query's object wants the score t = sigmoid(x)^alpha * IoU^(1 - alpha), at least 0.01 and without a gradient. Its
    logit x costs BCE(x, t), any other sigmoid(x)^gamma * BCE(x, 0), with the gradient of its weight. Matched, ranked
    and begun as under the focal loss.
    """

    share: float
    """Exponent alpha of the score in what is wanted."""

    def loss(self, logits: Tensor, matched: Matched, objects: Tensor, num_images: float) -> Tensor:
        """The sum over all logits by the number of objects."""
        place = matched.image, matched.query, matched.labels
        probability = logits.sigmoid()
        quality = probability.detach()[place].pow(self.share) * matched.overlap().pow(1 - self.share)
        quality = quality.clamp(min=0.01)
        positive = torch.zeros_like(logits)
        positive[place] = quality
        negative = probability.pow(self.gamma)
        negative[place] = 1 - quality
        summed = (positive * F.softplus(-logits) + negative * F.softplus(logits)).sum()
        return summed / objects.clamp(min=1)


@dataclass(frozen=True)
class MatchabilityAwareLoss(FocalLoss):
    """The matchability-aware loss of DEIM (arXiv 2412.04234): poor matches count as much as good ones.

    A logit x with an object costs BCE(x, IoU^exponent), any other sigmoid(x)^exponent * BCE(x, 0), whose weight passes
    no gradient on, as under the varifocal loss. Matched, ranked and begun as under the focal loss.
    """

    exponent: float
    """The paper's gamma; that of the matching is another one."""

    def loss(self, logits: Tensor, matched: Matched, objects: Tensor, num_images: float) -> Tensor:
        """The sum over all logits by the number of objects."""
        place = matched.image, matched.query, matched.labels
        wanted = torch.zeros_like(logits)
        wanted[place] = matched.overlap().pow(self.exponent)
        weight = logits.detach().sigmoid().pow(self.exponent)
        weight[place] = 1.0
        entropy = F.binary_cross_entropy_with_logits(logits, wanted, weight, reduction="sum")
        return entropy / objects.clamp(min=1)


@dataclass(frozen=True)
class SoftmaxLoss:
    """Cross-entropy with a last logit for "no object" (arXiv 2005.12872).

    A query has one class, its most probable one other than "no object", as in DETR's evaluation.
    """

    no_object: float
    """Weight of the "no object" class."""

    @property
    def bias(self) -> None:
        """No prior: "no object" is a class like the others."""
        return None

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The probability of the object's class, negated."""
        return -logits.softmax(-1).gather(-1, labels)

    def loss(self, logits: Tensor, matched: Matched, objects: Tensor, num_images: float) -> Tensor:
        """The sum over all queries by their weights in the global batch, which counts those without an object."""
        wanted = torch.full(logits.shape[:2], logits.shape[-1] - 1, dtype=torch.int64, device=logits.device)
        wanted[matched.image, matched.query] = matched.labels
        weight = torch.ones(logits.shape[-1], dtype=logits.dtype, device=logits.device)
        weight[-1] = self.no_object
        summed = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight, reduction="sum")
        queries = num_images * logits.shape[1]
        with_object = objects.clamp(max=queries)
        return summed / (with_object + self.no_object * (queries - with_object)).clamp(min=1e-6)

    def scores(self, logits: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
        """The queries whose best class is the most probable."""
        best, classes = logits.softmax(-1)[..., :-1].max(-1)  # [B, Q]
        scores, query = best.topk(min(top, best.shape[1]), dim=1)
        return scores, classes.gather(1, query), query


def make_class_loss(name: str, config: CriterionConfig | None = None) -> ClassLoss:
    """A class loss by the name that `DetrConfig.class_loss` has for it.

    Args:
        name: `focal`, `vfl`, `ia_bce`, `ma` or `softmax`.
        config: its settings; the defaults when None, which scores and biases do not depend on.

    Raises:
        ValueError: there is none of that name.
    """
    config = config or CriterionConfig()
    if name == "focal":
        return FocalLoss(config.focal_alpha, config.focal_gamma)
    if name == "vfl":
        return VarifocalLoss(config.focal_alpha, config.focal_gamma, config.vfl_alpha)
    if name == "ia_bce":
        return IouAwareLoss(config.focal_alpha, config.focal_gamma, config.ia_bce_alpha)
    if name == "ma":
        return MatchabilityAwareLoss(config.focal_alpha, config.focal_gamma, config.ma_gamma)
    if name == "softmax":
        return SoftmaxLoss(config.no_object_weight)
    raise ValueError(f'class_loss is "{name}", it must be focal, vfl, ia_bce, ma or softmax')
