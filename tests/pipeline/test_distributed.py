"""Processes that agree."""

import os
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist

from pipeline.distributed import (
    World,
    begin_sum_over_ranks,
    broadcast_object,
    close,
    gather_objects,
    init_world,
    on_rank_zero,
    together,
)
from pipeline.errors import UserError
from tests.ranks import Ranks, processes


def describe(world: World) -> tuple[int, int, str]:
    return world.rank, world.size, world.device.type


def agree(world: World) -> list[object]:
    first, second = (begin_sum_over_ranks(world, torch.tensor(values)) for values in ([2.0, world.rank], [7.0]))
    return [
        [summed().tolist() for summed in (first, second)],
        broadcast_object(world, f"from {world.rank}"),
        gather_objects(world, {"rank": world.rank}),
    ]


def fail_on(world: World, rank: int, user_error: bool) -> int:
    def work() -> int:
        if world.rank == rank:
            raise UserError("mend it") if user_error else ValueError("broken")
        return world.rank

    return together(world, work)


def only_rank_zero(world: World, fails: bool) -> str:
    def work() -> str:
        if fails:
            raise UserError(f"no file on {world.rank}")
        return f"by {world.rank}"

    return on_rank_zero(world, work)


def test_ranks_adopt_the_process_group_that_exists(ranks: Ranks) -> None:
    assert ranks.run(describe) == [(0, 2, "cpu"), (1, 2, "cpu")]


def test_ranks_agree(ranks: Ranks) -> None:
    expected = [[[4.0, 1.0], [14.0]], "from 0", [{"rank": 0}, {"rank": 1}]]
    assert ranks.run(agree) == [expected, expected]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_user_error_of_one_rank_is_raised_on_all(ranks: Ranks, rank: int) -> None:
    outcomes = ranks.outcomes(fail_on, rank, True)
    assert [(type(outcome), str(outcome)) for outcome in outcomes] == [(UserError, "mend it")] * 2


def test_another_error_of_one_rank_ends_all(ranks: Ranks) -> None:
    outcomes = ranks.outcomes(fail_on, 1, False)
    assert "rank 1 failed: broken" in str(outcomes[0])
    assert "ValueError: broken" in str(outcomes[1])


def test_rank_zero_works_for_all(ranks: Ranks) -> None:
    assert ranks.run(only_rank_zero, False) == ["by 0", "by 0"]
    assert [str(error) for error in ranks.outcomes(only_rank_zero, True)] == ["no file on 0"] * 2


def be_alone(pipe: Connection) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    world = init_world("cpu")
    adopted = init_world("cpu")
    seen = [describe(world), world.owned, adopted.owned, agree(world)]
    close(adopted)
    seen.append(dist.is_initialized())
    close(world)
    seen.append(dist.is_initialized())
    pipe.send(seen)


def test_a_plain_process_is_a_world_of_one() -> None:
    ours, theirs = processes().Pipe()
    process = processes().Process(target=be_alone, args=(theirs,))
    process.start()
    assert ours.poll(60)
    agreed = [[[2.0, 0.0], [7.0]], "from 0", [{"rank": 0}]]
    assert ours.recv() == [(0, 1, "cpu"), True, False, agreed, True, False]
    process.join()


def test_a_world_of_one_raises_its_own_error(world: World) -> None:
    with pytest.raises(ValueError, match="broken"):
        fail_on(world, 0, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named() -> None:
    with pytest.raises(UserError, match=r"cluster\.device is cuda"):
        init_world("cuda")
