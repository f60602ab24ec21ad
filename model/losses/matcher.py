"""One-to-one matching of predictions to objects by the least total cost (arXiv 2005.12872, section 3.1).

Shapes: K groups with the same Q queries, B batch, N the most objects of an image, C logits.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.boxes import at_least_float32, cxcywh_to_xyxy, pairwise_generalized_iou
from model.config import CriterionConfig
from model.losses.class_loss import ClassLoss
from model.losses.groups import Group, Matches, distinct_targets


@torch.no_grad()
def match_all(groups: Sequence[Group], config: CriterionConfig, class_loss: ClassLoss) -> list[Matches]:
    """Match each group's predictions to its objects, with one transfer to the host for all of them.

    The cost of a pair is the weighted sum of a class, an L1 and a generalised IoU cost, with the weights, alpha and
    gamma of the losses. An image with more objects than queries leaves objects over. A matching that a group brings is
    taken as it is.

    Args:
        groups: the number of queries and the objects may differ between them.
        config: weights.
        class_loss: gives the class cost.

    Returns:
        Of each group the matches of each image.
    """
    counts = [tuple(len(target["labels"]) for target in group.targets) for group in groups]
    none = torch.empty(0, dtype=torch.int64)
    matches = [[(none, none)] * len(group.targets) if group.matching is None else group.matching for group in groups]
    together: dict[tuple[int, tuple[int, ...]], list[int]] = {}  # groups of the same sizes share their kernels
    for index, group in enumerate(groups):
        if group.matching is None and any(counts[index]):
            together.setdefault((group.outputs["pred_logits"].shape[1], counts[index]), []).append(index)
    if not together:
        return matches
    costs = [_costs([groups[index] for index in members], config, class_loss) for members in together.values()]
    on_host = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
    start = 0
    for members, cost in zip(together.values(), costs, strict=True):
        matrices = on_host[start : start + cost.numel()].reshape(cost.shape)  # [K, B, Q, N]
        start += cost.numel()
        for member, of_group in zip(members, matrices, strict=True):
            matches[member] = [_assign(matrix[:, :n]) for matrix, n in zip(of_group, counts[member], strict=True)]
    return matches


def _costs(groups: Sequence[Group], config: CriterionConfig, class_loss: ClassLoss) -> Tensor:
    """Costs [K, B, Q, N] of groups with the same numbers of queries and objects."""
    padded = {
        key: [pad_sequence([target[name] for target in targets], batch_first=True) for name in ("labels", "boxes")]
        for key, targets in distinct_targets(groups).items()
    }
    labels, boxes = (
        torch.stack(column) for column in zip(*(padded[id(group.targets)] for group in groups), strict=True)
    )
    logits = torch.stack([group.outputs["pred_logits"] for group in groups])
    predicted = torch.stack([group.outputs["pred_boxes"] for group in groups])
    return matching_costs(logits, predicted, labels, boxes, config, class_loss)


def matching_costs(
    logits: Tensor, predicted: Tensor, labels: Tensor, boxes: Tensor, config: CriterionConfig, class_loss: ClassLoss
) -> Tensor:
    """Cost of every pair of a query and an object.

    Args:
        logits: `[K, B, Q, C]`.
        predicted: `[K, B, Q, 4]` cxcywh.
        labels: `[K, B, N]`.
        boxes: `[K, B, N, 4]` cxcywh.
        config: weights.
        class_loss: gives the class cost.

    Returns:
        `[K, B, Q, N]`.
    """
    logits, predicted, boxes = at_least_float32(logits), at_least_float32(predicted), at_least_float32(boxes)
    class_cost = class_loss.cost(logits, labels[:, :, None].expand(*logits.shape[:3], -1))
    bbox_cost = (predicted[..., :, None, :] - boxes[..., None, :, :]).abs().sum(-1)
    giou_cost = -pairwise_generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(boxes))
    class_weight = config.class_weight if config.class_cost is None else config.class_cost
    return class_weight * class_cost + config.bbox_weight * bbox_cost + config.giou_weight * giou_cost


def _assign(costs: NDArray[np.floating]) -> tuple[Tensor, Tensor]:
    """Least-cost pairs of `costs` [queries, objects]. A cost that is not finite counts as prohibitive rather than
    raising here: the loss is not finite then either, and the training loop raises that on all ranks at once.
    """
    from scipy.optimize import linear_sum_assignment  # with much else: who only builds a model does without

    query, target = linear_sum_assignment(np.nan_to_num(costs, nan=1e9, posinf=1e9, neginf=1e9))
    return torch.from_numpy(query.astype(np.int64)), torch.from_numpy(target.astype(np.int64))
