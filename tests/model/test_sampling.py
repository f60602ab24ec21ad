import pytest
import torch
from torch import Tensor

import model.deformable_attention
from model.deformable_attention import MSDeformAttn, make_levels
from model.sampling import Sampling, record_sampling
from tests.builders import make_batch, make_detector


def record(detector: torch.nn.Module, sizes: tuple[tuple[int, int], ...], seed: int = 0) -> Sampling:
    with torch.no_grad(), record_sampling(detector.transformer.decoder.layers[-1].cross_attn) as calls:
        detector(make_batch(sizes, seed))
    (sampling,) = calls
    return sampling


def test_an_offset_of_a_cell_is_a_cell_of_the_image_without_its_padding() -> None:
    attention = MSDeformAttn(hidden_dim=8, heads=1, levels=2, points=1)
    with torch.no_grad():
        attention.sampling_offsets.weight.zero_()
        attention.sampling_offsets.bias.copy_(torch.tensor([1.0, 0.5, -1.0, 1.0]))  # (x, y) of each level
        attention.attention_weights.weight.zero_()
        attention.attention_weights.bias.copy_(torch.tensor([3.0, 1.0]).log())
    shapes = [(4, 8), (2, 4)]
    masks = [torch.ones(1, *shape, dtype=torch.bool) for shape in shapes]
    masks[0][:, :2, :5] = False  # the image fills 5 x 2 cells of the first level, and 3 x 1 of the second
    masks[1][:, :1, :3] = False
    padding = torch.cat([mask.flatten(1) for mask in masks], dim=1)
    ratios = torch.tensor([[5 / 8, 2 / 4], [3 / 4, 1 / 2]])
    reference = torch.tensor([0.4, 0.5]) * ratios[None, None]
    with record_sampling(attention) as calls:
        attention(torch.randn(1, 1, 8), reference, torch.randn(1, 40, 8), make_levels(shapes, reference), padding)
    torch.testing.assert_close(calls[0].reference, torch.tensor([[[0.4, 0.5]]]))
    expected = torch.tensor([[0.4 + 1 / 5, 0.5 + 0.5 / 2], [0.4 - 1 / 3, 0.5 + 1.0]])
    torch.testing.assert_close(calls[0].points[0, 0, 0, :, 0], expected)
    torch.testing.assert_close(calls[0].weights[0, 0, 0, :, 0], torch.tensor([0.75, 0.25]))
    assert calls[0].shapes == shapes


@pytest.mark.parametrize("refine", [False, True], ids=["points", "boxes"])
def test_padding_of_the_batch_moves_nothing(refine: bool) -> None:
    detector = make_detector(with_box_refine=refine)
    for layer in detector.transformer.decoder.layers:  # points that the content of the images has no part in
        torch.nn.init.zeros_(layer.cross_attn.sampling_offsets.weight)
    together = record(detector, ((64, 128), (128, 64)))
    alone = [record(detector, ((64, 128),)), record(detector, ((128, 64),), seed=1)]
    for image, one in enumerate(alone):
        torch.testing.assert_close(together.reference[image], one.reference[0])
        torch.testing.assert_close(together.points[image], one.points[0])


def test_recorded_is_what_the_operator_got(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[Tensor, Tensor]] = []
    operator = model.deformable_attention.ms_deform_attn

    def spy(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
        got.append((locations, weights))
        return operator(value, shapes, locations, weights)

    monkeypatch.setattr(model.deformable_attention, "ms_deform_attn", spy)
    sampling = record(make_detector(with_box_refine=True, two_stage=True), ((64, 96),))  # no padding
    locations, weights = got[-1]
    assert torch.equal(sampling.points, locations)
    assert torch.equal(sampling.weights, weights)


def test_nothing_is_kept_afterwards() -> None:
    detector = make_detector()
    attention = detector.transformer.decoder.layers[-1].cross_attn
    with pytest.raises(RuntimeError), record_sampling(attention) as calls:
        raise RuntimeError
    detector(make_batch(((64, 64),)))
    assert calls == []
