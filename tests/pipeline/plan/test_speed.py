"""pipeline/plan/speed.py: rings."""

from typing import Any

import pytest

from pipeline.plan.memory import Layout
from pipeline.plan.speed import Exchange, Link
from pipeline.train.reduce import BUCKETS

LAYOUT = Layout(groups=((900_000, 50_000), (50_000,)), frozen=(200_000,), buffers=0, saved=1_200_000)
LINK = Link(bandwidth=1e9, latency=1e-3)
QUICK = Link(bandwidth=1e9, latency=0)
BYTES = 4_000_000


def exchange(stage: int, **zero: Any) -> Exchange:
    return Exchange(LAYOUT, stage, {"reduce_bucket_size": 50_000_000, **zero})


def test_a_ring_by_hand() -> None:
    assert LINK.gather(1e9, 4) == pytest.approx(3 * (0.25 + 1e-3))
    assert LINK.all_reduce(1e9, 4, calls=2) == pytest.approx(2 * 3 * (0.25 + 2e-3))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_has_nobody_to_wait_for(stage: int) -> None:
    assert exchange(stage).seconds(1, 8, 1.0, LINK) == 0


@pytest.mark.parametrize(
    ("stage", "sent"),
    [
        pytest.param(0, 2 * BYTES / BUCKETS, id="the last gradients once a step"),
        pytest.param(1, 3 * BYTES, id="and then the weights"),
        pytest.param(2, 3 * 2 * BYTES + BYTES, id="gradients of every micro-batch"),
        pytest.param(3, 3 * (BYTES + 4 * 1_100_000), id="scattered, and the large weights gathered"),
    ],
)
def test_what_is_sent_at_each_stage(stage: int, sent: float) -> None:
    assert exchange(stage).seconds(2, 3, 1.0, QUICK) == pytest.approx(sent / 2 / 1e9)


def test_every_parameter_is_gathered_where_none_persists() -> None:
    more = exchange(3, stage3_param_persistence_threshold=0).seconds(2, 1, 1.0, QUICK)
    assert more - exchange(3).seconds(2, 1, 1.0, QUICK) == pytest.approx(4 * 100_000 / 2 / 1e9)


def test_smaller_buckets_are_more_messages() -> None:
    few, many = (exchange(1, reduce_bucket_size=size).seconds(2, 1, 1.0, LINK) for size in (1_000_000, 100_000))
    assert many - few == pytest.approx(2 * 9 * 1e-3)


def test_reductions_hide_behind_the_backward_pass_where_they_may() -> None:
    hidden = exchange(2, overlap_comm=True)
    assert hidden.seconds(2, 3, 1.0, QUICK) == pytest.approx(BYTES / 2 / 1e9), "the weights alone"
    assert hidden.seconds(2, 3, 0.0, QUICK) == exchange(2).seconds(2, 3, 0.0, QUICK)
    assert exchange(0).seconds(2, 3, 0.0, QUICK) == pytest.approx(2 * BYTES / 2 / 1e9)
