"""One-to-one matching of predictions to objects by the least total cost (arXiv 2005.12872, section 3.1).

Shapes: K outputs (decoder layers) with the same Q queries, B batch, N the most objects of an image, C logits.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.boxes import at_least_float32, cxcywh_to_xyxy, pairwise_generalized_iou
from model.config import CriterionConfig

Matches = list[tuple[Tensor, Tensor]]
"""Of each image the indices of matched queries and of their objects, int64 on the host, in the order of the queries."""


def match(
    outputs: dict[str, Tensor], targets: Sequence[dict[str, Tensor]], config: CriterionConfig, class_loss: str
) -> Matches:
    """Match the predictions of one output; see `match_all`."""
    return match_all([outputs], targets, config, class_loss)[0]


@torch.no_grad()
def match_all(
    outputs: Sequence[dict[str, Tensor]],
    targets: Sequence[dict[str, Tensor]],
    config: CriterionConfig,
    class_loss: str,
    of_proposals: Sequence[bool] | None = None,
) -> list[Matches]:
    """Match several outputs to the same objects, each on its own, with one transfer to the host.

    The cost of a pair is the weighted sum of a class, an L1 and a generalised IoU cost, with the weights, alpha and
    gamma of the losses. An image with more objects than queries leaves objects over.

    Args:
        outputs: each `pred_logits` [B, Q, C] and `pred_boxes` [B, Q, 4] cxcywh; Q may differ between them.
        targets: of each image `labels` [n] int64 and `boxes` [n, 4] cxcywh.
        config: weights.
        class_loss: `focal` or `softmax`.
        of_proposals: of each output whether it only tells objects from none: for it every object has the label 0.

    Returns:
        Of each output the matches of each image.
    """
    counts = [len(target["labels"]) for target in targets]
    if not any(counts):
        none = torch.empty(0, dtype=torch.int64)
        return [[(none, none) for _ in targets] for _ in outputs]
    labels = pad_sequence([target["labels"] for target in targets], batch_first=True)  # [B, N]
    boxes = pad_sequence([target["boxes"] for target in targets], batch_first=True)  # [B, N, 4]
    groups: dict[int, list[int]] = {}  # outputs of the same number of queries share their kernels
    for index, output in enumerate(outputs):
        groups.setdefault(output["pred_logits"].shape[1], []).append(index)
    costs = []
    for members in groups.values():
        logits = torch.stack([outputs[index]["pred_logits"] for index in members])
        predicted = torch.stack([outputs[index]["pred_boxes"] for index in members])
        flags = [of_proposals is not None and of_proposals[index] for index in members]
        wanted = torch.stack([torch.zeros_like(labels) if flag else labels for flag in flags])
        costs.append(matching_costs(logits, predicted, wanted, boxes, config, class_loss))
    on_host = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
    matches: list[Matches] = [[] for _ in outputs]
    start = 0
    for members, cost in zip(groups.values(), costs, strict=True):
        matrices = on_host[start : start + cost.numel()].reshape(cost.shape)  # [K, B, Q, N]
        start += cost.numel()
        for member, of_output in zip(members, matrices, strict=True):
            matches[member] = [_assign(matrix[:, :n]) for matrix, n in zip(of_output, counts, strict=True)]
    return matches


def matching_costs(
    logits: Tensor, predicted: Tensor, labels: Tensor, boxes: Tensor, config: CriterionConfig, class_loss: str
) -> Tensor:
    """Costs [K, B, Q, N] of `logits` [K, B, Q, C], `predicted` [K, B, Q, 4]; `labels` [K, B, N], `boxes` [B, N, 4]."""
    logits, predicted, boxes = at_least_float32(logits), at_least_float32(predicted), at_least_float32(boxes)
    wanted = labels[:, :, None].expand(*logits.shape[:3], -1)  # [K, B, Q, N]
    if class_loss == "focal":
        # The change of the focal loss when a query turns from background to the object's class.
        chosen = logits.gather(-1, wanted)
        probability = chosen.sigmoid()
        alpha, gamma = config.focal_alpha, config.focal_gamma
        positive = alpha * (1 - probability).pow(gamma) * F.softplus(-chosen)
        negative = (1 - alpha) * probability.pow(gamma) * F.softplus(chosen)
        class_cost = positive - negative
    else:
        class_cost = -logits.softmax(-1).gather(-1, wanted)
    bbox_cost = (predicted[..., :, None, :] - boxes[..., None, :, :]).abs().sum(-1)
    giou_cost = -pairwise_generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(boxes))
    return config.class_weight * class_cost + config.bbox_weight * bbox_cost + config.giou_weight * giou_cost


def _assign(costs: NDArray[np.floating]) -> tuple[Tensor, Tensor]:
    """Least-cost pairs of `costs` [queries, objects]. A cost that is not finite counts as prohibitive rather than
    raising here: the loss is not finite then either, and the training loop raises that on all ranks at once.
    """
    query, target = linear_sum_assignment(np.nan_to_num(costs, nan=1e9, posinf=1e9, neginf=1e9))
    return torch.from_numpy(query.astype(np.int64)), torch.from_numpy(target.astype(np.int64))
