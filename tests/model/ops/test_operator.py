import math

import pytest
import torch
from torch import Tensor

from model.ops import compiled, ms_deform_attn, reference

SHAPES = [(3, 5), (2, 2), (1, 1)]


def make_inputs(
    batch: int = 2, queries: int = 3, heads: int = 2, channels: int = 2, points: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, locations (some outside) and weights in fp64."""
    generator = torch.Generator().manual_seed(seed)
    kind = {"dtype": torch.float64, "generator": generator}
    value = torch.randn(batch, sum(h * w for h, w in SHAPES), heads, channels, **kind)
    locations = torch.rand(batch, queries, heads, len(SHAPES), points, 2, **kind) * 1.6 - 0.3
    weights = torch.randn(batch, queries, heads, len(SHAPES) * points, **kind).softmax(-1)
    return value, locations, weights.view(batch, queries, heads, len(SHAPES), points)


def bilinear(image: Tensor, x: float, y: float) -> Tensor:
    """Value [D] of an image [H, W, D] at (x, y) in 0..1, cell by cell: zero outside, centres at (i + 0.5) / size."""
    height, width, channels = image.shape
    column, row = x * width - 0.5, y * height - 0.5
    total = torch.zeros(channels, dtype=image.dtype)
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                total = total + image[i, j] * (1 - abs(row - i)) * (1 - abs(column - j))
    return total


def from_first_principles(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    batch, queries, heads, _, points = weights.shape
    output = torch.zeros(batch, queries, heads, value.shape[-1], dtype=value.dtype)
    starts = [sum(h * w for h, w in SHAPES[:level]) for level in range(len(SHAPES))]
    for b in range(batch):
        for q in range(queries):
            for m in range(heads):
                for level, (height, width) in enumerate(SHAPES):
                    start = starts[level]
                    image = value[b, start : start + height * width, m].reshape(height, width, -1)
                    for p in range(points):
                        x, y = locations[b, q, m, level, p].tolist()
                        output[b, q, m] += weights[b, q, m, level, p] * bilinear(image, x, y)
    return output.flatten(2)


class TestReferenceAgainstFirstPrinciples:
    @pytest.mark.parametrize("seed", range(3))
    def test_values(self, seed: int) -> None:
        value, locations, weights = make_inputs(seed=seed)
        expected = from_first_principles(value, locations, weights)
        torch.testing.assert_close(reference.ms_deform_attn(value, SHAPES, locations, weights), expected)

    def test_gradients(self) -> None:
        inputs = [tensor.requires_grad_() for tensor in make_inputs(batch=1, queries=2)]
        assert torch.autograd.gradcheck(lambda v, s, w: reference.ms_deform_attn(v, SHAPES, s, w), inputs)

    def test_centre_of_a_cell_is_its_value(self) -> None:
        value, locations, weights = make_inputs(batch=1, queries=1, heads=1, points=1)
        locations[...] = 0.5
        weights[...] = torch.tensor([1.0, 0.0, 0.0]).view(1, 1, 1, 3, 1)
        torch.testing.assert_close(reference.ms_deform_attn(value, SHAPES, locations, weights)[0, 0], value[0, 7, 0])

    def test_far_outside_is_zero(self) -> None:
        value, locations, weights = make_inputs()
        assert not reference.ms_deform_attn(value, SHAPES, locations + 3, weights).any()

    def test_16_bit_values_are_summed_in_32(self) -> None:
        value, locations, weights = make_inputs()
        exact = reference.ms_deform_attn(value.bfloat16().double(), SHAPES, locations, weights)
        output = reference.ms_deform_attn(value.bfloat16(), SHAPES, locations.float(), weights.float())
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output.double(), exact, rtol=2**-8, atol=1e-6)


class TestOperator:
    def test_without_kernels_it_is_the_reference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("model.ops.operator.kernels", None)
        monkeypatch.setattr("model.ops.operator._MISSING", "it was not built", raising=False)
        value, locations, weights = make_inputs()
        assert not compiled()
        expected = reference.ms_deform_attn(value, SHAPES, locations, weights)
        assert torch.equal(ms_deform_attn(value, SHAPES, locations, weights), expected)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param(lambda v, s, w: (v[:, 1:], s, w), "do not add up", id="cells"),
            pytest.param(lambda v, s, w: (v, s[:, 1:], w), "do not fit attention_weights", id="queries"),
            pytest.param(lambda v, s, w: (v[:1], s, w), "do not fit value", id="batch"),
            pytest.param(lambda v, s, w: (v, s[..., 1:, :, :], w[..., 1:, :]), "do not fit value", id="levels"),
            pytest.param(lambda v, s, w: (v.flatten(2), s, w), r"takes value \[B, S, M, D\]", id="dimensions"),
        ],
    )
    def test_shapes_that_do_not_fit_are_refused(self, change, message: str) -> None:
        value, locations, weights = change(*make_inputs())
        with pytest.raises(ValueError, match=message):
            ms_deform_attn(value, SHAPES, locations, weights)
