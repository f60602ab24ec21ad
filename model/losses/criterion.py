"""The losses of DETR (arXiv 2005.12872) and Deformable DETR (arXiv 2010.04159): class, L1 and generalised IoU.

Shapes: B batch, Q queries, C logits, n objects of an image. Everything is computed in fp32, also under autocast.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.boxes import at_least_float32, cxcywh_to_xyxy, generalized_iou
from model.config import CriterionConfig
from model.losses.matcher import Matches, match_all

PROPOSALS = "_enc"
"""Suffix of the losses of the encoder's proposals."""


class Criterion:
    """Named losses of a model's outputs, unweighted, and their weighted sum.

    Args:
        num_classes: classes without "no object".
        config: weights.
        class_loss: `focal` (sigmoid) or `softmax` (with a last logit for "no object").
    """

    def __init__(self, num_classes: int, config: CriterionConfig, class_loss: Literal["focal", "softmax"]) -> None:
        self.num_classes = num_classes
        self.config = config
        self.class_loss = class_loss
        self.weights = {
            "loss_ce": config.class_weight,
            "loss_bbox": config.bbox_weight,
            "loss_giou": config.giou_weight,
        }
        """Weight of each loss; those of auxiliary layers and of the proposals have the same."""

    def __call__(
        self,
        outputs: Mapping[str, Any],
        targets: Sequence[Mapping[str, Tensor]],
        num_boxes: Tensor | float,
        num_images: float | None = None,
    ) -> dict[str, Tensor]:
        """Losses of the last decoder layer, of each one before it (`_0`, ...) and of the proposals (`_enc`).

        Each of them is matched to the objects on its own. For the proposals every object has the label 0: theirs is the
        question whether there is an object. The normalisers are those of the whole global batch, so the losses of its
        micro-batches add up to its loss, however it is cut.

        Args:
            outputs: what the model gives.
            targets: of each image `labels` int64 [n] and `boxes` [n, 4] cxcywh in 0..1, on the device.
            num_boxes: objects of the global batch; taken as at least 1.
            num_images: images of the global batch, for the softmax loss, whose normaliser counts unmatched queries too;
                those of `targets` when None.
        """
        layers = {"": outputs} | {f"_{i}": layer for i, layer in enumerate(outputs.get("aux_outputs", ()))}
        if "enc_outputs" in outputs:
            layers[PROPOSALS] = outputs["enc_outputs"]
        with torch.autocast(outputs["pred_logits"].device.type, enabled=False):
            return self._losses(layers, targets, num_boxes, len(targets) if num_images is None else num_images)

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Weighted sum of the losses that `__call__` gives."""
        terms = [self.weights["_".join(name.split("_")[:2])] * loss for name, loss in losses.items()]
        return torch.stack(terms).sum()

    def _losses(
        self,
        layers: Mapping[str, Mapping[str, Any]],
        targets: Sequence[Mapping[str, Tensor]],
        num_boxes: Tensor | float,
        num_images: float,
    ) -> dict[str, Tensor]:
        """Losses of the layers, given and named by their suffixes, after one matching of them all."""
        predictions = [{key: output[key] for key in ("pred_logits", "pred_boxes")} for output in layers.values()]
        of_proposals = [suffix == PROPOSALS for suffix in layers]
        objects_of = [dict(target) for target in targets]
        matches = match_all(predictions, objects_of, self.config, self.class_loss, of_proposals)
        device = predictions[0]["pred_logits"].device
        indices = [index.to(device, non_blocking=True) for index in _gather_indices(matches, targets)]
        labels = torch.cat([target["labels"] for target in targets])
        boxes = at_least_float32(torch.cat([target["boxes"] for target in targets]))
        objects = torch.as_tensor(num_boxes, dtype=boxes.dtype)
        losses = {}
        for suffix, prediction, (image, query, row) in zip(layers, predictions, indices, strict=True):
            logits = at_least_float32(prediction["pred_logits"])
            wanted_labels = torch.zeros_like(row) if suffix == PROPOSALS else labels[row]
            if self.class_loss == "focal":
                losses["loss_ce" + suffix] = self._focal(logits, image, query, wanted_labels) / objects.clamp(min=1)
            else:
                losses["loss_ce" + suffix] = self._softmax(logits, image, query, wanted_labels, objects, num_images)
            predicted, wanted = at_least_float32(prediction["pred_boxes"])[image, query], boxes[row]
            l1 = (predicted - wanted).abs().sum()
            giou = (1 - generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))).sum()
            losses["loss_bbox" + suffix] = l1 / objects.clamp(min=1)
            losses["loss_giou" + suffix] = giou / objects.clamp(min=1)
        return losses

    def _focal(self, logits: Tensor, image: Tensor, query: Tensor, labels: Tensor) -> Tensor:
        """Sum over all logits of the sigmoid focal loss (arXiv 1708.02002, equation 5).

        The original's mean over queries times their number is this sum.
        """
        wanted = torch.zeros_like(logits)
        wanted[image, query, labels] = 1.0
        alpha, gamma = self.config.focal_alpha, self.config.focal_gamma
        entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        probability = logits.sigmoid()
        missed = probability + wanted - 2 * probability * wanted  # 1 - probability of the right answer
        weight = alpha * wanted + (1 - alpha) * (1 - wanted)
        return (weight * missed.pow(gamma) * entropy).sum()

    def _softmax(
        self, logits: Tensor, image: Tensor, query: Tensor, labels: Tensor, objects: Tensor, num_images: float
    ) -> Tensor:
        """Cross-entropy with a lower weight on "no object", normalised by the weights of the global batch."""
        no_object = self.config.no_object_weight
        wanted = torch.full(logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device)
        wanted[image, query] = labels
        weight = torch.ones(logits.shape[-1], dtype=logits.dtype, device=logits.device)
        weight[-1] = no_object
        summed = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight, reduction="sum")
        queries = num_images * logits.shape[1]
        matched = objects.clamp(max=queries)
        return summed / (matched + no_object * (queries - matched)).clamp(min=1e-6)


def _gather_indices(matches: Sequence[Matches], targets: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """Of each layer [3, matched]: image, query, and row of the object when the targets are concatenated."""
    starts = [0, *accumulate(len(target["labels"]) for target in targets)][:-1]
    indices = []
    for layer in matches:
        image = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(layer)])
        query = torch.cat([query for query, _ in layer])
        row = torch.cat([target + start for (_, target), start in zip(layer, starts, strict=True)])
        indices.append(torch.stack((image, query, row)))
    return indices
