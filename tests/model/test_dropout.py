"""Dropout, of elements and of branches: how much is dropped, what is left, and what the gradient sees."""

import pytest
import torch

from model.dropout import Dropout, DropPath


def drop(p: float, shape: tuple[int, ...] = (501, 401), seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    result: torch.Tensor = Dropout(p)(torch.ones(shape))
    return result


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_drops_so_many_and_scales_the_others(p: float) -> None:
    out = drop(p)
    share = (out == 0).double().mean().item()
    deviation = (p * (1 - p) / out.numel()) ** 0.5
    assert share == pytest.approx(p, abs=4 * deviation)
    assert out[out != 0].unique().item() == pytest.approx(1 / (1 - p), rel=1e-4)


def test_neighbours_are_dropped_independently() -> None:
    """Four neighbours share one draw of 64 bits."""
    dropped = (drop(0.5, (40000, 4)) == 0).double()
    correlation = torch.corrcoef(dropped.T) - torch.eye(4)
    assert correlation.abs().max() < 0.03


def test_the_gradient_is_dropped_and_scaled_alike() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 31, requires_grad=True)
    out = Dropout(0.3)(x)
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x.detach(), out.detach())


def test_follows_the_global_seed() -> None:
    assert torch.equal(drop(0.1), drop(0.1))
    assert not torch.equal(drop(0.1), drop(0.1, seed=1))


def test_does_nothing_in_evaluation_nor_at_0() -> None:
    x = torch.randn(3, 5)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x


def test_a_half_precision_and_an_odd_count() -> None:
    out = Dropout(0.25)(torch.ones(3, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert out.shape == (3,)


class TestDropPath:
    def test_drops_whole_images_and_scales_the_others(self) -> None:
        torch.manual_seed(0)
        out = DropPath(0.25)(torch.ones(4000, 2, 3, dtype=torch.bfloat16))
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, out[:, :1, :1].expand_as(out))
        first = out[:, 0, 0].float()
        assert (first == 0).float().mean().item() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 4000) ** 0.5)
        assert first[first != 0].unique().item() == pytest.approx(4 / 3, rel=1e-2)

    def test_follows_the_global_seed(self) -> None:
        outs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            outs.append(DropPath(0.5)(torch.ones(64, 1)))
        assert torch.equal(outs[0], outs[1])
        assert not torch.equal(outs[0], outs[2])

    def test_does_nothing_in_evaluation_nor_at_0(self) -> None:
        x = torch.randn(3, 5)
        assert DropPath(0.5).eval()(x) is x
        assert DropPath(0.0)(x) is x
