import pytest
import torch

from model.boxes import (
    at_least_float32,
    box_area,
    cxcywh_to_xyxy,
    generalized_iou,
    inverse_sigmoid,
    iou,
    pairwise_generalized_iou,
)


def test_corners_by_hand() -> None:
    boxes = torch.tensor([[0.5, 0.4, 0.2, 0.6], [0.1, 0.2, 0.0, 0.0]], dtype=torch.float64)
    corners = cxcywh_to_xyxy(boxes)
    torch.testing.assert_close(corners[0], torch.tensor([0.4, 0.1, 0.6, 0.7], dtype=torch.float64))
    torch.testing.assert_close(corners[1], torch.tensor([0.1, 0.2, 0.1, 0.2], dtype=torch.float64))
    torch.testing.assert_close(box_area(corners), torch.tensor([0.12, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        pytest.param([0.0, 0.0, 2.0, 2.0], 1.0, id="equal"),
        pytest.param([1.0, 1.0, 3.0, 3.0], 1 / 7 - 2 / 9, id="overlap"),
        pytest.param([4.0, 0.0, 6.0, 2.0], -4 / 12, id="apart"),
        pytest.param([0.5, 0.5, 1.5, 1.5], 1 / 4, id="inside"),
        pytest.param([3.0, 3.0, 3.0, 3.0], -5 / 9, id="no area"),
    ],
)
def test_generalized_iou_by_hand(second: list[float], expected: float) -> None:
    first = torch.tensor([0.0, 0.0, 2.0, 2.0])
    assert generalized_iou(first, torch.tensor(second)).item() == pytest.approx(expected)


def test_iou_by_hand() -> None:
    first = torch.tensor([0.0, 0.0, 2.0, 2.0])
    others = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 3.0], [4.0, 0.0, 6.0, 2.0], [0.5, 0.5, 1.5, 1.5]])
    torch.testing.assert_close(iou(first, others), torch.tensor([1.0, 1 / 7, 0.0, 1 / 4]))
    assert iou(others[0, :1].expand(4), others[0, :1].expand(4)) == 0


def test_two_boxes_without_area_are_finite_with_finite_gradient() -> None:
    box = torch.tensor([0.3, 0.3, 0.3, 0.3], requires_grad=True)
    value = generalized_iou(box, torch.tensor([0.3, 0.3, 0.3, 0.3]))
    value.backward()
    assert torch.isfinite(value)
    assert box.grad is not None
    assert torch.isfinite(box.grad).all()


def test_pairwise_is_every_pair() -> None:
    boxes = cxcywh_to_xyxy(torch.rand(2, 7, 4, generator=torch.Generator().manual_seed(0)))
    pairs = pairwise_generalized_iou(boxes[:, :3], boxes[:, 3:])
    assert pairs.shape == (2, 3, 4)
    torch.testing.assert_close(pairs[1, 2, 0], generalized_iou(boxes[1, 2], boxes[1, 3]))


def test_inverse_sigmoid_is_clamped() -> None:
    x = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    expected = torch.tensor([1e-5, 1 / 3, 1e5], dtype=torch.float64).log()
    torch.testing.assert_close(inverse_sigmoid(x), expected)


def test_at_least_float32() -> None:
    kinds = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    for kind, expected in kinds.items():
        assert at_least_float32(torch.zeros(1, dtype=kind)).dtype == expected
