"""model/memory.py: what autograd keeps, and what is alive, what is moved."""

import torch

from model.memory import LiveBytes, MovedBytes, kept_for_backward

FLOATS = 1000
SIZE = 4 * FLOATS


def test_what_the_backward_pass_needs_is_counted_once_and_without_what_is_apart() -> None:
    weight, source = torch.rand(FLOATS, requires_grad=True), torch.rand(FLOATS)
    with kept_for_backward([weight]) as kept:
        product = weight * source  # keeps source; weight would be for source's gradient
        result = product.exp()  # keeps its own result
        total = (result.view(10, -1) * result[:FLOATS].view(10, -1)).sum()  # the same storage again
    assert sum(kept.values()) == 2 * SIZE
    total.backward()  # type: ignore[no-untyped-call]
    del product, result, total
    assert sum(kept.values()) == SIZE, "the source is still here"


def test_what_is_alive_and_the_most_at_a_time() -> None:
    before = torch.rand(FLOATS)
    with LiveBytes() as live:
        first = before + 1
        second = first + 1
        view = second.view(10, -1)
        del first, second
        assert live.now == SIZE, "a view holds its storage"
        assert live.peak == 2 * SIZE
        del view
        before.add_(1)
        assert live.now == 0
    assert live.peak == 2 * SIZE


def test_the_backward_pass_is_seen() -> None:
    weight = torch.rand(FLOATS, requires_grad=True)
    with LiveBytes() as live:
        loss = weight.exp().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        assert live.now == SIZE, "the gradient alone"


def test_what_is_read_and_written() -> None:
    one, other = torch.rand(FLOATS), torch.rand(1)
    with MovedBytes() as moved:
        one + other
        assert moved.total == 2 * SIZE + 4
        one.view(10, -1).transpose(0, 1)
        assert moved.total == 2 * SIZE + 4, "a view moves nothing"
        one.add_(1)
        assert moved.total == 4 * SIZE + 4
        other.expand(FLOATS).clone()
        assert moved.total == 5 * SIZE + 8
    with MovedBytes(apart=[torch.ops.aten.add]) as moved:
        one + other
    assert moved.total == 0
