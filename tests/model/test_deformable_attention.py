import pytest
import torch

from model.deformable_attention import MSDeformAttn, make_levels

SHAPES = [(4, 6), (2, 3)]
CELLS = 30
LEVELS = make_levels(SHAPES, torch.zeros((), dtype=torch.float64))


def make_attention() -> MSDeformAttn:
    torch.manual_seed(0)
    module = MSDeformAttn(hidden_dim=16, heads=2, levels=2, points=3).double()
    with torch.no_grad():
        module.sampling_offsets.weight.mul_(0.1)
    return module


def make_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 5, 16, dtype=torch.float64, generator=generator)
    source = torch.randn(2, CELLS, 16, dtype=torch.float64, generator=generator)
    reference = torch.rand(2, 5, 1, 2, dtype=torch.float64, generator=generator).expand(-1, -1, 2, -1)
    return query, source, reference


def test_offsets_are_in_cells_of_their_level() -> None:
    module = make_attention()
    _, _, reference = make_inputs()
    offsets = torch.ones(2, 5, 2, 2, 3, 2, dtype=torch.float64)
    moved = module._locations(reference, offsets, LEVELS) - reference[:, :, None, :, None]
    for level, (height, width) in enumerate(SHAPES):
        expected = torch.tensor([1 / width, 1 / height], dtype=torch.float64).expand(2, 5, 2, 3, 2)
        torch.testing.assert_close(moved[:, :, :, level], expected)


def test_offsets_about_boxes_are_in_halves_of_their_size_over_the_points() -> None:
    module = make_attention()
    box = torch.tensor([0.5, 0.4, 0.2, 0.6], dtype=torch.float64).expand(2, 5, 2, 4)
    offsets = torch.full((2, 5, 2, 2, 3, 2), 3.0, dtype=torch.float64)  # as many as points: the border of the box
    expected = torch.tensor([0.6, 0.7], dtype=torch.float64).expand(2, 5, 2, 2, 3, 2)
    torch.testing.assert_close(module._locations(box, offsets, LEVELS), expected)


def test_weights_are_shared_out_over_levels_and_points() -> None:
    module = make_attention()
    with torch.no_grad():  # values are one everywhere and points stay inside, so the output is the sum of the weights
        module.sampling_offsets.weight.zero_()
        module.sampling_offsets.bias.zero_()
        module.value_proj.weight.zero_()
        module.value_proj.bias.fill_(1.0)
        module.output_proj.weight.copy_(torch.eye(16))
        module.output_proj.bias.zero_()
    query, source, _ = make_inputs()
    reference = torch.full((2, 5, 2, 2), 0.5, dtype=torch.float64)
    output = module(query, reference, source, LEVELS, torch.zeros(2, CELLS, dtype=torch.bool))
    torch.testing.assert_close(output, torch.ones_like(output))


@pytest.mark.parametrize("change", [0.0, 1e3, float("nan")], ids=["zero", "large", "nan"])
def test_padded_cells_do_not_matter(change: float) -> None:
    module = make_attention()
    query, source, reference = make_inputs()
    padding = torch.zeros(2, CELLS, dtype=torch.bool)
    padding[:, ::4] = True
    expected = module(query, reference, source, LEVELS, padding)
    changed = source.masked_fill(padding[..., None], change)
    torch.testing.assert_close(module(query, reference, changed, LEVELS, padding), expected)
    assert not torch.allclose(expected, module(query, reference, source, LEVELS, torch.zeros_like(padding)))


def test_locations_stay_fp32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_attention().float()
    query, source, reference = make_inputs()
    kinds: list[torch.dtype] = []
    locations = module._locations
    monkeypatch.setattr(module, "_locations", lambda r, o, s: kinds.append(o.dtype) or locations(r, o, s))
    with torch.autocast("cpu", torch.bfloat16):
        levels = make_levels(SHAPES, torch.zeros(()))
        output = module(query.float(), reference.float(), source.float(), levels, torch.zeros(2, CELLS).bool())
    assert kinds == [torch.float32]
    assert output.dtype == torch.bfloat16
