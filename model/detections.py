"""Turn a model's outputs into detections in pixels.

Shapes: B batch, Q queries, C logits.
"""

import torch
from torch import Tensor

from model.boxes import at_least_float32, cxcywh_to_xyxy
from model.losses.class_loss import make_class_loss


@torch.no_grad()
def postprocess(
    pred_logits: Tensor, pred_boxes: Tensor, sizes: Tensor, class_loss: str, top: int = 100
) -> list[dict[str, Tensor]]:
    """The best detections of each image, without suppression and without clipping to the image.

    Under the focal loss a detection is a pair of a query and a class, so a query may appear more than once. Under the
    softmax loss a query has one class, its most probable one other than "no object", as in DETR's evaluation.

    Args:
        pred_logits: `[B, Q, C]`.
        pred_boxes: `[B, Q, 4]` cxcywh in 0..1.
        sizes: `[B, 2]`, original (height, width) of each image in pixels.
        class_loss: as `DetrConfig.class_loss`.
        top: most detections of an image.

    Returns:
        Of each image `scores` [k] in falling order, `labels` [k], `boxes` [k, 4] xyxy in pixels and `queries` [k], the
        number of the query that gave it.

    Raises:
        ValueError: there is no such class loss, or `sizes` has another shape.
    """
    if sizes.shape != (len(pred_logits), 2):
        raise ValueError(f"sizes has the shape {tuple(sizes.shape)}, expected ({len(pred_logits)}, 2) as height, width")
    columns = best_detections(pred_logits, pred_boxes, sizes, class_loss, top)
    return [{"scores": s, "labels": c, "boxes": b, "queries": q} for s, c, b, q in zip(*columns, strict=True)]


def best_detections(
    pred_logits: Tensor, pred_boxes: Tensor, sizes: Tensor, class_loss: str, top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `postprocess` gives, of all images at once: scores, labels, boxes `[B, k, 4]` and queries, `[B, k]` each."""
    scores, labels, query = make_class_loss(class_loss).scores(at_least_float32(pred_logits), top)
    boxes = cxcywh_to_xyxy(at_least_float32(pred_boxes)).gather(1, query[..., None].expand(-1, -1, 4))
    boxes = boxes * sizes.to(boxes).flip(1).repeat(1, 2)[:, None]  # width, height, width, height
    return scores, labels, boxes, query
