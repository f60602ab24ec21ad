import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model.boxes import cxcywh_to_xyxy, generalized_iou
from model.config import CriterionConfig
from model.losses.criterion import Criterion
from model.losses.matcher import match
from tests.builders import make_target

CONFIG = CriterionConfig()


def make_outputs(batch: int = 2, queries: int = 6, logits: int = 5, aux: int = 2, cells: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def layer(count: int) -> dict[str, Tensor]:
        boxes = torch.rand(batch, count, 4, generator=generator) * 0.5 + 0.1
        return {
            "pred_logits": torch.randn(batch, count, logits, generator=generator).requires_grad_(),
            "pred_boxes": boxes.requires_grad_(),
        }

    outputs: dict[str, Any] = layer(queries) | {"aux_outputs": [layer(queries) for _ in range(aux)]}
    return outputs | ({"enc_outputs": layer(cells)} if cells else {})


def focal(logit: float, wanted: bool) -> float:
    p = 1 / (1 + math.exp(-logit))
    return 0.25 * (1 - p) ** 2 * -math.log(p) if wanted else 0.75 * p**2 * -math.log(1 - p)


def test_losses_from_their_definitions() -> None:
    outputs, targets = make_outputs(aux=0), [make_target(2), make_target(1, seed=1)]
    losses = Criterion(5, CONFIG, "focal")(outputs, targets, 3.0)
    matches = match({key: outputs[key] for key in ("pred_logits", "pred_boxes")}, targets, CONFIG, "focal")
    class_loss = l1 = giou = 0.0
    for image, (queries, rows) in enumerate(matches):
        owner = {int(q): int(targets[image]["labels"][t]) for q, t in zip(queries, rows, strict=True)}
        for q in range(6):
            for c in range(5):
                class_loss += focal(outputs["pred_logits"][image, q, c].item(), owner.get(q) == c)
        for q, t in zip(queries.tolist(), rows.tolist(), strict=True):
            predicted, wanted = outputs["pred_boxes"][image, q], targets[image]["boxes"][t]
            l1 += (predicted - wanted).abs().sum().item()
            giou += 1 - generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted)).item()
    assert losses["loss_ce"].item() == pytest.approx(class_loss / 3, rel=1e-5)
    assert losses["loss_bbox"].item() == pytest.approx(l1 / 3, rel=1e-5)
    assert losses["loss_giou"].item() == pytest.approx(giou / 3, rel=1e-5)


def test_names_and_total() -> None:
    criterion = Criterion(5, CONFIG, "focal")
    losses = criterion(make_outputs(cells=20), [make_target(2), make_target(1, seed=1)], 3.0)
    kinds = ("loss_ce", "loss_bbox", "loss_giou")
    assert set(losses) == {kind + suffix for kind in kinds for suffix in ("", "_0", "_1", "_enc")}
    by_kind = [sum(losses[kind + suffix].item() for suffix in ("", "_0", "_1", "_enc")) for kind in kinds]
    expected = 2 * by_kind[0] + 5 * by_kind[1] + 2 * by_kind[2]
    assert criterion.total(losses).item() == pytest.approx(expected, rel=1e-5)


def test_auxiliary_layers_are_matched_anew() -> None:
    outputs, targets = make_outputs(), [make_target(3), make_target(2, seed=1)]
    criterion = Criterion(5, CONFIG, "focal")
    losses = criterion(outputs, targets, 5.0)
    for index, layer in enumerate(outputs["aux_outputs"]):
        alone = criterion(layer, targets, 5.0)
        for name, loss in alone.items():
            torch.testing.assert_close(losses[f"{name}_{index}"], loss)


def test_proposals_are_told_object_from_none() -> None:
    outputs, targets = make_outputs(cells=20), [make_target(3), make_target(2, seed=1)]
    criterion = Criterion(5, CONFIG, "focal")
    binary = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
    expected = criterion(outputs["enc_outputs"], binary, 5.0)
    torch.testing.assert_close(criterion(outputs, targets, 5.0)["loss_ce_enc"], expected["loss_ce"])
    assert any(target["labels"].any() for target in targets)


@pytest.mark.parametrize("class_loss", ["focal", "softmax"])
@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (400, 1)], ids=["no object", "an empty image", "400 objects"])
def test_edges(class_loss: str, counts: tuple[int, int]) -> None:
    outputs = make_outputs(logits=6, cells=20)
    targets = [make_target(n, seed=n) for n in counts]
    criterion = Criterion(5, CONFIG, class_loss)  # type: ignore[arg-type]
    total = criterion.total(criterion(outputs, targets, float(sum(counts))))
    total.backward()
    assert torch.isfinite(total)
    for layer in (outputs, *outputs["aux_outputs"], outputs["enc_outputs"]):
        assert layer["pred_logits"].grad.abs().sum() > 0
        assert torch.isfinite(layer["pred_boxes"].grad).all()


def test_one_pixel_objects() -> None:
    outputs = make_outputs()
    tiny = {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 1 / 1333, 1 / 800]])}
    criterion = Criterion(5, CONFIG, "focal")
    total = criterion.total(criterion(outputs, [tiny, tiny], 2.0))
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(outputs["pred_boxes"].grad).all()


@pytest.mark.parametrize("class_loss", ["focal", "softmax"])
def test_micro_batches_add_up(class_loss: str) -> None:
    outputs = make_outputs(batch=4, logits=6)
    targets = [make_target(n, seed=n) for n in (2, 0, 3, 1)]
    criterion = Criterion(5, CONFIG, class_loss)  # type: ignore[arg-type]
    whole = criterion(outputs, targets, torch.tensor(6.0), num_images=4)
    sums = dict.fromkeys(whole, 0.0)
    for start, stop in ((0, 1), (1, 4)):
        part = {key: outputs[key][start:stop] for key in ("pred_logits", "pred_boxes")}
        part["aux_outputs"] = [{k: v[start:stop] for k, v in layer.items()} for layer in outputs["aux_outputs"]]
        for name, loss in criterion(part, targets[start:stop], torch.tensor(6.0), num_images=4).items():
            sums[name] += loss.item()
    assert sums == pytest.approx({name: loss.item() for name, loss in whole.items()}, rel=1e-5)


def test_num_boxes_is_at_least_one() -> None:
    outputs, targets = make_outputs(), [make_target(1), make_target(0)]
    criterion = Criterion(5, CONFIG, "focal")
    less, one, two = (criterion(outputs, targets, n)["loss_bbox"].item() for n in (0.25, 1.0, 2.0))
    assert less == one == pytest.approx(2 * two)


def test_softmax_is_torchs_weighted_mean() -> None:
    outputs = make_outputs(batch=1, logits=6, aux=0)
    target = make_target(2)
    query, row = match(outputs, [target], CONFIG, "softmax")[0]
    wanted = torch.full((6,), 5)
    wanted[query] = target["labels"][row]
    weight = torch.tensor([1.0, 1, 1, 1, 1, 0.1])
    expected = torch.nn.functional.cross_entropy(outputs["pred_logits"][0], wanted, weight)
    loss = Criterion(5, CONFIG, "softmax")(outputs, [target], 2.0)["loss_ce"]
    torch.testing.assert_close(loss, expected)


def test_softmax_without_any_object_is_torchs_weighted_mean() -> None:
    outputs = make_outputs(batch=2, logits=6, aux=0)
    expected = torch.nn.functional.cross_entropy(outputs["pred_logits"].flatten(0, 1), torch.full((12,), 5))
    losses = Criterion(5, CONFIG, "softmax")(outputs, [make_target(0), make_target(0)], 0.0)
    torch.testing.assert_close(losses["loss_ce"], expected)
    assert losses["loss_bbox"] == losses["loss_giou"] == 0


@pytest.mark.parametrize("class_loss", ["focal", "softmax"])
@pytest.mark.parametrize(("num_classes", "label"), [(91, 90), (91, 1), (80, 79), (80, 0)])
def test_a_label_is_the_number_of_its_logit(class_loss: str, num_classes: int, label: int) -> None:
    """`coco91` has labels up to 90, and some that no category has; `contiguous` has 0 to n - 1; "no object" is last."""
    outputs = make_outputs(batch=1, queries=3, logits=num_classes + (class_loss == "softmax"), aux=0)
    target = {"labels": torch.tensor([label]), "boxes": outputs["pred_boxes"][0, 1:2].detach()}
    Criterion(num_classes, CONFIG, class_loss)(outputs, [target], 1.0)["loss_ce"].backward()  # type: ignore[arg-type]
    raised = [set((row < 0).nonzero().flatten().tolist()) for row in outputs["pred_logits"].grad[0]]
    nothing = {num_classes} if class_loss == "softmax" else set()
    assert raised == [nothing, {label}, nothing]


@pytest.mark.parametrize("place", ["outputs", "targets"])
def test_what_is_not_finite_shows_in_the_loss_without_raising(place: str) -> None:
    outputs, targets = make_outputs(), [make_target(2), make_target(1)]
    with torch.no_grad():
        if place == "outputs":
            outputs["pred_logits"][0, 0] = float("nan")
        else:
            targets[0]["boxes"][0, 2] = float("nan")
    criterion = Criterion(5, CONFIG, "focal")
    assert not torch.isfinite(criterion.total(criterion(outputs, targets, 3.0)))


def test_losses_are_fp32_under_autocast() -> None:
    outputs, targets = make_outputs(), [make_target(2), make_target(1)]
    criterion = Criterion(5, CONFIG, "focal")
    expected = criterion(outputs, targets, 3.0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = criterion(outputs, targets, 3.0)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name])
