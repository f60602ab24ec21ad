import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model.boxes import cxcywh_to_xyxy, generalized_iou
from model.config import CriterionConfig, OneToMany
from model.losses.class_loss import make_class_loss
from model.losses.criterion import Criterion, Losses
from model.losses.groups import Group, groups_of
from model.losses.matcher import match_all
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


def losses_of(
    outputs: dict[str, Any], targets: list[dict[str, Tensor]], num_boxes: Any, class_loss: str = "focal", **more: Any
) -> Losses:
    return Criterion(CONFIG, class_loss)(groups_of(outputs, targets), num_boxes, **more)


def focal(logit: float, wanted: bool) -> float:
    p = 1 / (1 + math.exp(-logit))
    return 0.25 * (1 - p) ** 2 * -math.log(p) if wanted else 0.75 * p**2 * -math.log(1 - p)


def test_losses_from_their_definitions() -> None:
    outputs, targets = make_outputs(aux=0), [make_target(2), make_target(1, seed=1)]
    losses = losses_of(outputs, targets, 3.0).values
    (matches,) = match_all([Group(outputs, targets)], CONFIG, make_class_loss("focal", CONFIG))
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
    found = losses_of(make_outputs(cells=20), [make_target(2), make_target(1, seed=1)], 3.0)
    losses = found.values
    kinds = ("loss_ce", "loss_bbox", "loss_giou")
    assert list(losses) == [kind + suffix for suffix in ("", "_0", "_1", "_enc") for kind in kinds]
    by_kind = [sum(losses[kind + suffix].item() for suffix in ("", "_0", "_1", "_enc")) for kind in kinds]
    expected = 2 * by_kind[0] + 5 * by_kind[1] + 2 * by_kind[2]
    assert found.total().item() == pytest.approx(expected, rel=1e-5)
    assert found.scaled(0.5).total().item() == pytest.approx(expected / 2, rel=1e-5)


def test_auxiliary_layers_are_matched_anew() -> None:
    outputs, targets = make_outputs(), [make_target(3), make_target(2, seed=1)]
    losses = losses_of(outputs, targets, 5.0).values
    for index, layer in enumerate(outputs["aux_outputs"]):
        alone = losses_of(layer, targets, 5.0).values
        for name, loss in alone.items():
            torch.testing.assert_close(losses[f"{name}_{index}"], loss)


def test_proposals_are_told_object_from_none() -> None:
    outputs, targets = make_outputs(cells=20), [make_target(3), make_target(2, seed=1)]
    binary = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
    expected = losses_of(outputs["enc_outputs"], binary, 5.0).values
    torch.testing.assert_close(losses_of(outputs, targets, 5.0).values["loss_ce_enc"], expected["loss_ce"])
    assert any(target["labels"].any() for target in targets)


@pytest.mark.parametrize("class_loss", ["focal", "vfl", "ia_bce", "ma", "softmax"])
@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (400, 1)], ids=["no object", "an empty image", "400 objects"])
def test_edges(class_loss: str, counts: tuple[int, int]) -> None:
    outputs = make_outputs(logits=6, cells=20)
    targets = [make_target(n, seed=n) for n in counts]
    total = losses_of(outputs, targets, float(sum(counts)), class_loss).total()
    total.backward()
    assert torch.isfinite(total)
    for layer in (outputs, *outputs["aux_outputs"], outputs["enc_outputs"]):
        assert layer["pred_logits"].grad.abs().sum() > 0
        assert torch.isfinite(layer["pred_boxes"].grad).all()


def test_one_pixel_objects() -> None:
    outputs = make_outputs()
    tiny = {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 1 / 1333, 1 / 800]])}
    total = losses_of(outputs, [tiny, tiny], 2.0).total()
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(outputs["pred_boxes"].grad).all()


@pytest.mark.parametrize("class_loss", ["focal", "vfl", "ia_bce", "ma", "softmax"])
def test_micro_batches_add_up(class_loss: str) -> None:
    outputs = make_outputs(batch=4, logits=6)
    targets = [make_target(n, seed=n) for n in (2, 0, 3, 1)]
    whole = losses_of(outputs, targets, torch.tensor(6.0), class_loss, num_images=4).values
    sums = dict.fromkeys(whole, 0.0)
    for start, stop in ((0, 1), (1, 4)):
        part = {key: outputs[key][start:stop] for key in ("pred_logits", "pred_boxes")}
        part["aux_outputs"] = [{k: v[start:stop] for k, v in layer.items()} for layer in outputs["aux_outputs"]]
        losses = losses_of(part, targets[start:stop], torch.tensor(6.0), class_loss, num_images=4)
        for name, loss in losses.values.items():
            sums[name] += loss.item()
    assert sums == pytest.approx({name: loss.item() for name, loss in whole.items()}, rel=1e-5)


def test_num_boxes_is_at_least_one() -> None:
    outputs, targets = make_outputs(), [make_target(1), make_target(0)]
    less, one, two = (losses_of(outputs, targets, n).values["loss_bbox"].item() for n in (0.25, 1.0, 2.0))
    assert less == one == pytest.approx(2 * two)


def test_softmax_is_torchs_weighted_mean() -> None:
    outputs = make_outputs(batch=1, logits=6, aux=0)
    target = make_target(2)
    query, row = match_all([Group(outputs, [target])], CONFIG, make_class_loss("softmax", CONFIG))[0][0]
    wanted = torch.full((6,), 5)
    wanted[query] = target["labels"][row]
    weight = torch.tensor([1.0, 1, 1, 1, 1, 0.1])
    expected = torch.nn.functional.cross_entropy(outputs["pred_logits"][0], wanted, weight)
    loss = losses_of(outputs, [target], 2.0, "softmax").values["loss_ce"]
    torch.testing.assert_close(loss, expected)


def test_softmax_without_any_object_is_torchs_weighted_mean() -> None:
    outputs = make_outputs(batch=2, logits=6, aux=0)
    expected = torch.nn.functional.cross_entropy(outputs["pred_logits"].flatten(0, 1), torch.full((12,), 5))
    losses = losses_of(outputs, [make_target(0), make_target(0)], 0.0, "softmax").values
    torch.testing.assert_close(losses["loss_ce"], expected)
    assert losses["loss_bbox"] == losses["loss_giou"] == 0


@pytest.mark.parametrize("class_loss", ["focal", "softmax"])
@pytest.mark.parametrize(("num_classes", "label"), [(91, 90), (91, 1), (80, 79), (80, 0)])
def test_a_label_is_the_number_of_its_logit(class_loss: str, num_classes: int, label: int) -> None:
    """`coco91` has labels up to 90, and some that no category has; `contiguous` has 0 to n - 1; "no object" is last."""
    outputs = make_outputs(batch=1, queries=3, logits=num_classes + (class_loss == "softmax"), aux=0)
    target = {"labels": torch.tensor([label]), "boxes": outputs["pred_boxes"][0, 1:2].detach()}
    losses_of(outputs, [target], 1.0, class_loss).values["loss_ce"].backward()
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
    assert not torch.isfinite(losses_of(outputs, targets, 3.0).total())


def test_losses_are_fp32_under_autocast() -> None:
    outputs, targets = make_outputs(), [make_target(2), make_target(1)]
    expected = losses_of(outputs, targets, 3.0).values
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(outputs, targets, 3.0).values
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name])


class TestGroups:
    def test_a_given_matching_is_taken_as_it_is(self) -> None:
        outputs, targets = make_outputs(aux=0), [make_target(2), make_target(1, seed=1)]
        given = [(torch.tensor([5, 0]), torch.tensor([1, 0])), (torch.tensor([3]), torch.tensor([0]))]
        losses = Criterion(CONFIG, "focal")([Group(outputs, targets, "_dn", given)], 3.0).values
        pairs = [(0, 5, 1), (0, 0, 0), (1, 3, 0)]
        l1 = sum((outputs["pred_boxes"][i, q] - targets[i]["boxes"][t]).abs().sum().item() for i, q, t in pairs)
        assert losses["loss_bbox_dn"].item() == pytest.approx(l1 / 3, rel=1e-5)

    def test_repeated_targets_give_each_object_as_many_queries(self) -> None:
        outputs, target = make_outputs(batch=1, queries=6, aux=0), make_target(2)
        repeated = [{key: value.repeat(3, *[1] * (value.ndim - 1)) for key, value in target.items()}]
        groups = [Group(outputs, [target]), Group(outputs, repeated, "_many", weight=1 / 3)]
        ((_, once),), ((query, rows),) = match_all(groups, CONFIG, make_class_loss("focal", CONFIG))
        assert sorted(once.tolist()) == [0, 1]
        assert query.tolist() == [0, 1, 2, 3, 4, 5]
        assert sorted(row % 2 for row in rows.tolist()) == [0, 0, 0, 1, 1, 1]
        losses = Criterion(CONFIG, "focal")(groups, 2.0)
        assert losses.weights["loss_bbox_many"] == pytest.approx(CONFIG.bbox_weight / 3)
        every = [(losses.values[name] * weight).item() for name, weight in losses.weights.items()]
        assert losses.total().item() == pytest.approx(sum(every), rel=1e-5)

    @pytest.mark.parametrize("class_loss", ["focal", "softmax"])
    def test_one_to_many_is_as_if_there_were_as_many_objects(self, class_loss: str) -> None:
        outputs, more = make_outputs(logits=6, aux=1), make_outputs(queries=20, logits=6, aux=1)
        targets = [make_target(2), make_target(1, seed=1)]
        groups = groups_of({**outputs, "one_to_many": more}, targets, OneToMany(20, 4, 0.5))
        assert [group.suffix for group in groups] == ["", "_0", "_many", "_many_0"]
        losses = Criterion(CONFIG, class_loss)(groups, 3.0)
        repeated = [{key: torch.cat([value] * 4) for key, value in target.items()} for target in targets]
        alone = losses_of(more, repeated, 12.0, class_loss)
        for name, loss in alone.values.items():
            kind, _, layer = name.partition("_0") if name.endswith("_0") else (name, "", "")
            of_many = f"{kind}_many{'_0' if name.endswith('_0') else layer}"
            torch.testing.assert_close(losses.values[of_many], loss)
            assert losses.weights[of_many] == alone.weights[name] / 2
        for name, loss in losses_of(outputs, targets, 3.0, class_loss).values.items():
            assert torch.equal(losses.values[name], loss)

    def test_groups_do_not_change_each_other(self) -> None:
        outputs, more = make_outputs(aux=0), make_outputs(queries=9, aux=0)
        targets, others = [make_target(2), make_target(0)], [make_target(1, seed=3), make_target(4, seed=4)]
        groups = [Group(outputs, targets), Group(more, others, "_b"), Group(outputs, others, "_c")]
        criterion = Criterion(CONFIG, "focal")
        together = criterion(groups, 5.0, 2).values
        apart = [criterion([group], 5.0, 2).values for group in groups]
        assert together == {name: loss for losses in apart for name, loss in losses.items()}

    def test_the_proposals_objects_have_the_label_0(self) -> None:
        targets = [make_target(3), make_target(2, seed=1)]
        last, *layers, proposals = groups_of(make_outputs(cells=20), targets)
        assert [group.suffix for group in (last, *layers, proposals)] == ["", "_0", "_1", "_enc"]
        assert all(group.targets is targets for group in (last, *layers))
        for group_target, target in zip(proposals.targets, targets, strict=True):
            assert not group_target["labels"].any()
            assert group_target["boxes"] is target["boxes"]

    def test_equal_suffixes_are_our_own_mistake(self) -> None:
        outputs, targets = make_outputs(aux=0), [make_target(1), make_target(1)]
        with pytest.raises(AssertionError, match="suffixes"):
            Criterion(CONFIG, "focal")([Group(outputs, targets)] * 2, 2.0)
