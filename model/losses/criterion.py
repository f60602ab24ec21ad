"""The losses of DETR (arXiv 2005.12872) and Deformable DETR (arXiv 2010.04159): class, L1 and generalised IoU.

    criterion = Criterion(CriterionConfig(), "focal")
    losses = criterion(groups_of(model(batch), targets), num_boxes)
    losses.total().backward()

Shapes: B batch, Q queries, C logits, n objects of an image. Everything is computed in fp32, also under autocast.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from model.boxes import at_least_float32, cxcywh_to_xyxy, generalized_iou
from model.config import CriterionConfig
from model.losses.class_loss import Matched, make_class_loss
from model.losses.groups import Group, Matches, Targets, distinct_targets
from model.losses.matcher import match_all


@dataclass(frozen=True)
class Losses:
    """Scalars by name, such as `loss_ce`, `loss_bbox_0`, `loss_giou_enc`."""

    values: dict[str, Tensor]
    """Unweighted."""
    weights: dict[str, float]
    """What each counts in the total."""

    def total(self) -> Tensor:
        """Their weighted sum."""
        return torch.stack([self.weights[name] * loss for name, loss in self.values.items()]).sum()

    def scaled(self, factor: float) -> "Losses":
        """The same with every value times `factor`."""
        return replace(self, values={name: loss * factor for name, loss in self.values.items()})


class Criterion:
    """Named losses of a model's outputs and the weight of each.

    Args:
        config: weights, and the settings of the class loss.
        class_loss: as `DetrConfig.class_loss`.
    """

    def __init__(self, config: CriterionConfig, class_loss: str) -> None:
        self.config = config
        self.class_loss = make_class_loss(class_loss, config)
        self.weights = {
            "loss_ce": config.class_weight,
            "loss_bbox": config.bbox_weight,
            "loss_giou": config.giou_weight,
        }
        """Weight of each kind of loss, in every group."""

    def __call__(self, groups: Sequence[Group], num_boxes: Tensor | float, num_images: float | None = None) -> Losses:
        """Losses of groups, each matched to its objects on its own.

        The normalisers are those of the whole global batch, so the losses of its micro-batches add up to its loss,
        however it is cut.

        Args:
            groups: of a model's outputs `groups_of` makes them; their suffixes differ.
            num_boxes: objects of the global batch; taken as at least 1.
            num_images: images of the global batch, for class losses whose normaliser counts unmatched queries too;
                those of the targets when None.
        """
        device = groups[0].outputs["pred_logits"].device
        with torch.autocast(device.type, enabled=False):
            matches = match_all(groups, self.config, self.class_loss)
            objects = {key: _concatenated(targets) for key, targets in distinct_targets(groups).items()}
            values, weights = {}, {}
            for group, of_group in zip(groups, matches, strict=True):
                indices = _indices(of_group, group.targets).to(device, non_blocking=True)
                labels, boxes = objects[id(group.targets)]
                images = len(group.targets) if num_images is None else num_images
                for kind, loss in self._losses(group, indices, labels, boxes, num_boxes, images).items():
                    values[kind + group.suffix] = loss
                    weights[kind + group.suffix] = self.weights[kind] * group.weight
        assert len(values) == len(groups) * len(self.weights), "suffixes of groups differ"
        return Losses(values, weights)

    def _losses(
        self,
        group: Group,
        indices: Tensor,
        labels: Tensor,
        boxes: Tensor,
        num_boxes: Tensor | float,
        num_images: float,
    ) -> dict[str, Tensor]:
        """Losses of a group by kind; `indices` [3, matched] are of images, queries and rows of `labels` and `boxes`."""
        image, query, row = indices
        predicted, wanted = at_least_float32(group.outputs["pred_boxes"])[image, query], boxes[row]
        counted = num_boxes * group.repeats if group.per_image is None else num_images * group.per_image
        objects = torch.as_tensor(counted, dtype=boxes.dtype)
        matched = Matched(image, query, labels[row], predicted, wanted)
        logits = at_least_float32(group.outputs["pred_logits"])
        class_loss = self.class_loss.loss(logits, matched, objects, num_images)
        l1 = (predicted - wanted).abs().sum()
        giou = (1 - generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))).sum()
        return {
            "loss_ce": class_loss,
            "loss_bbox": l1 / objects.clamp(min=1),
            "loss_giou": giou / objects.clamp(min=1),
        }


def _concatenated(targets: Targets) -> tuple[Tensor, Tensor]:
    """Labels and boxes of all images, one after the other."""
    boxes = at_least_float32(torch.cat([target["boxes"] for target in targets]))
    return torch.cat([target["labels"] for target in targets]), boxes


def _indices(matches: Matches, targets: Targets) -> Tensor:
    """[3, matched]: image, query, and row of the object when the targets are concatenated."""
    starts = [0, *accumulate(len(target["labels"]) for target in targets)][:-1]
    image = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(matches)])
    query = torch.cat([query for query, _ in matches])
    row = torch.cat([target + start for (_, target), start in zip(matches, starts, strict=True)])
    return torch.stack((image, query, row))
