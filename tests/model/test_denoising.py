"""Objects with noise as queries of training alone."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.batch import ImageBatch
from model.boxes import cxcywh_to_xyxy
from model.config import CriterionConfig, Denoising, DetrConfig
from model.denoising import DRAWS, Noised, add_noise
from model.losses.criterion import Criterion
from model.losses.groups import groups_of
from tests.builders import make_batch, make_detector, make_target

CONFIG = Denoising(queries=12, label_noise=0.3, box_noise=0.8)
TARGETS = [make_target(4), make_target(0), make_target(9, seed=1)]


def make_draws(images: int = 3, queries: int = 12) -> Any:
    return np.random.default_rng(0).random((images, queries, DRAWS))


def make_noised(targets: Any = TARGETS, draws: Any = None) -> Noised:
    return add_noise(targets, CONFIG, 5, make_draws(len(targets)) if draws is None else draws)


def test_boxes_and_labels_by_hand() -> None:
    target = {"labels": torch.tensor([3]), "boxes": torch.tensor([[0.5, 0.4, 0.2, 0.1]], dtype=torch.float64)}
    draws = np.zeros((1, 2, DRAWS))
    draws[0, 0, :6] = [0.75, 0.5, 0.25, 0.5, 0.31, 0.9]  # edges by a half, 0, minus a half, 0; the label stays
    draws[0, 1, :6] = [0.25, 0.75, 0.5, 0.5, 0.29, 0.9]  # by -1.5, 1.5, 1, 1; label 4 of 5
    found = add_noise([target], Denoising(2, 0.3, 0.8), 5, draws)
    assert found.labels.tolist() == [[3, 4]]
    near = [0.4 + 0.8 * 0.05, 0.35, 0.6 - 0.8 * 0.05, 0.45]
    far = [0.4 - 0.8 * 0.15, 0.35 + 0.8 * 0.075, 0.6 + 0.8 * 0.1, 0.45 + 0.8 * 0.05]
    torch.testing.assert_close(cxcywh_to_xyxy(found.boxes)[0], torch.tensor([near, far], dtype=torch.float64))


def test_the_first_half_is_near_and_the_second_too_far_off() -> None:
    target = {"labels": torch.zeros(3, dtype=torch.int64), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.1]] * 3)}
    found = add_noise([target], Denoising(2000, 0.5, 0.4), 10, make_draws(1, 2000))
    moved = (cxcywh_to_xyxy(found.boxes) - torch.tensor([0.4, 0.45, 0.6, 0.55])).abs()[0]
    moved /= torch.tensor([0.1, 0.05, 0.1, 0.05]) * 0.4
    assert moved[:1000].max() < 1
    assert moved[1000:].min() > 0.999
    assert moved.max() < 2
    assert (found.labels == 0).float().mean().item() == pytest.approx(0.5 + 0.5 / 10, abs=0.03)


def test_boxes_stay_in_the_image_and_are_never_turned_inside_out() -> None:
    target = {"labels": torch.zeros(2, dtype=torch.int64), "boxes": torch.tensor([[0.1, 0.9, 0.2, 0.2], [0.5] * 4])}
    boxes = cxcywh_to_xyxy(add_noise([target], Denoising(400, 0.0, 3.0), 5, make_draws(1, 400)).boxes)
    assert boxes.min() >= -1e-6
    assert boxes.max() <= 1 + 1e-6
    assert (boxes[..., 2:] >= boxes[..., :2]).all()


def test_pairs_go_round_the_objects_of_their_image() -> None:
    found = make_noised()
    for image, count in enumerate((4, 0, 9)):
        queries, objects = found.matching[image]
        assert queries.tolist() == list(range(6 if count else 0))
        start = int(make_draws()[image, 0, 6] * count)
        assert objects.tolist() == [(start + number) % count for number in range(6 if count else 0)]
        for group in found.group[image, :6].unique() if count else ():
            of_group = objects[found.group[image, :6] == group]
            assert len(of_group.unique()) == len(of_group)
        assert torch.equal(found.group[image, :6], found.group[image, 6:])
    assert found.group[0, :6].tolist() == [0, 0, 0, 0, 1, 1]
    assert found.empty.tolist() == [False, True, False]


def test_an_image_has_the_same_whatever_the_others() -> None:
    together, draws = make_noised(), make_draws()
    for image in range(3):
        alone = make_noised([TARGETS[image]], draws[image : image + 1])
        for all_images, one in zip(together[:4], alone[:4], strict=True):
            assert torch.equal(all_images[image], one[0])


def make_model(**settings: Any) -> Any:
    more = {"with_box_refine": True, "two_stage": "mixed", "denoising": CONFIG, "dropout": 0.0, **settings}
    model = make_detector(**more).double().train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def doubled(found: Noised) -> Noised:
    return found._replace(boxes=found.boxes.double())


def batch_of(count: int = 3) -> ImageBatch:
    batch = make_batch([(96, 96), (64, 96), (96, 80)][:count])
    return ImageBatch(batch.pixels.double(), batch.mask)


def boxes_of(outputs: dict[str, Any]) -> Tensor:
    return torch.stack([layer["pred_boxes"].detach() for layer in (outputs, *outputs["aux_outputs"])])


@pytest.mark.parametrize("settings", [{}, {"two_stage": True}, {"look_forward_twice": True}])
def test_the_detectors_own_queries_do_not_see_them(settings: dict[str, Any]) -> None:
    model = make_model(**settings)
    found, expected = model(batch_of(), doubled(make_noised())), model(batch_of())
    assert found["denoising"]["pred_logits"].shape == (3, 12, 5)
    torch.testing.assert_close(boxes_of(found), boxes_of(expected), rtol=1e-9, atol=1e-9)
    without = make_model(**settings, denoising=None)
    state = {name: tensor for name, tensor in model.state_dict().items() if "label_embed" not in name}
    without.load_state_dict(state)
    assert torch.equal(model.eval()(batch_of())["pred_boxes"], without.eval()(batch_of())["pred_boxes"])


def test_they_see_their_own_group_and_the_detectors_queries() -> None:
    model, noised = make_model(), doubled(make_noised())
    before = boxes_of(model(batch_of(), noised)["denoising"])
    moved = noised.boxes.clone()
    moved[0, 5] = torch.tensor([0.3, 0.3, 0.4, 0.4])  # group 1 of the first image has the queries 4, 5, 10 and 11
    after = boxes_of(model(batch_of(), noised._replace(boxes=moved))["denoising"])
    changed = (after - before).abs().amax(dim=(0, 3)) > 1e-12
    assert changed.nonzero().tolist() == [[0, 4], [0, 5], [0, 10], [0, 11]]
    with torch.no_grad():
        model.query_embed.weight.add_(1.0)
    changed = (boxes_of(model(batch_of(), noised)["denoising"]) - before).abs().amax(dim=(0, 3)) > 1e-12
    assert changed.all()


def losses_of(model: Any, batch: ImageBatch, targets: Any, noised: Noised, num_images: int = 3) -> dict[str, Tensor]:
    groups = groups_of(model(batch, noised), targets, None, noised)
    return Criterion(CriterionConfig(), model.config.class_loss)(groups, 13.0, num_images).values


@pytest.mark.parametrize("class_loss", ["focal", "vfl", "ia_bce", "ma"])
def test_images_without_objects_add_nothing(class_loss: str) -> None:
    model = make_model(class_loss=class_loss, feature_levels=3)
    targets = [{"labels": target["labels"], "boxes": target["boxes"].double()} for target in TARGETS]
    batch, draws = batch_of(), make_draws()
    whole = losses_of(model, batch, targets, add_noise(targets, CONFIG, 5, draws))
    noise_losses = {name for name in whole if "_dn" in name}
    assert len(noise_losses) == 9
    part = [0, 2]
    without = losses_of(
        model,
        ImageBatch(batch.pixels[part], batch.mask[part]),
        [targets[image] for image in part],
        add_noise([targets[image] for image in part], CONFIG, 5, draws[part]),
    )
    for name in noise_losses:
        torch.testing.assert_close(whole[name], without[name], rtol=1e-9, atol=1e-12)
    empty = losses_of(model, batch_of(1), targets[1:2], add_noise(targets[1:2], CONFIG, 5, draws[1:2]))
    assert all(empty[name] == 0 for name in noise_losses)


def test_losses_are_of_the_objects_that_are_known() -> None:
    model = make_model()
    targets = [{"labels": target["labels"], "boxes": target["boxes"].double()} for target in TARGETS]
    noised = add_noise(targets, CONFIG, 5, make_draws())
    outputs = model(batch_of(), noised)
    losses = Criterion(CriterionConfig(), "focal")(groups_of(outputs, targets, None, noised), 13.0, 3).values
    predicted = outputs["denoising"]["pred_boxes"]
    expected = sum(
        (predicted[image, query] - targets[image]["boxes"][row]).abs().sum().item()
        for image in range(3)
        for query, row in zip(*noised.matching[image], strict=True)
    )
    assert losses["loss_bbox_dn"].item() == pytest.approx(expected / (3 * 6), rel=1e-9)


def test_their_labels_are_trained() -> None:
    model = make_model()
    targets = [{"labels": target["labels"], "boxes": target["boxes"].double()} for target in TARGETS]
    sum(losses_of(model, batch_of(), targets, add_noise(targets, CONFIG, 5, make_draws())).values()).backward()  # type: ignore[union-attr]
    gradient = model.transformer.label_embed.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries": 3}, "queries is 3, it must be an even number"),
        ({"queries": 0}, "queries is 0"),
        ({"label_noise": 1.5}, r"label_noise is 1.5, it must be in \[0, 1\]"),
        ({"box_noise": 0.0}, "box_noise is 0.0, it must be above 0"),
    ],
)
def test_impossible_noise_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Denoising(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "^denoising needs two_stage"),
        ({"with_box_refine": True, "two_stage": True, "class_loss": "softmax"}, "^denoising needs a class_loss"),
        ({"arch": "detr", "feature_levels": 1}, "set denoising: null, or arch"),
    ],
)
def test_where_it_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetrConfig(denoising=CONFIG, **settings)
