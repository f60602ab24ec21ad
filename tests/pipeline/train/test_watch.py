"""The watch over the ranks: who is lost, who hangs, who is slow, and that nobody is accused wrongly."""

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.distributed import close, init_world
from pipeline.run_folder import RunFolder
from pipeline.train.watch import BEATS, EXIT_CODE, Beat, Peers, Watch
from tests.heads import free_port
from tests.ranks import processes

TIMEOUT = 1.5
WAIT_SECONDS = 120


def beats(number: int, steps: int = 0, seconds: tuple[float, ...] = (0, 0)) -> dict[int, Beat | None]:
    return {rank: Beat("a", number, steps, value) for rank, value in enumerate(seconds)}


class TestPeers:
    def test_those_who_beat_and_step_are_well(self) -> None:
        peers = Peers(60, 120)
        assert not any(peers.verdict(beats(number, steps=number // 10)) for number in range(10 * BEATS))

    def test_a_silent_rank_is_lost(self) -> None:
        peers = Peers(60, 1e9)
        told = [peers.verdict(beats(number) | {1: Beat("b", 1, 0, 0)}) for number in range(BEATS + 1)]
        assert told[:-1] == [None] * BEATS
        assert told[-1] == "rank 1 on b gave no sign of life for 60 s (cluster.timeout)"

    def test_a_rank_that_never_came_is_lost(self) -> None:
        peers = Peers(60, 1e9)
        told = [peers.verdict(beats(number) | {1: None}) for number in range(BEATS)]
        assert told[:-1] == [None] * (BEATS - 1)
        assert told[-1] == "rank 1 gave no sign of life for 60 s (cluster.timeout)"

    def test_a_rank_that_is_done_is_not_missed(self) -> None:
        peers = Peers(60, 1e9)
        assert not any(peers.verdict(beats(number) | {1: Beat("b", 1, 0, 0, True)}) for number in range(9 * BEATS))

    def test_steps_that_do_not_end_hang(self) -> None:
        peers = Peers(60, 120)
        told = [peers.verdict(beats(number, steps=3)) for number in range(2 * BEATS + 1)]
        assert told[:-1] == [None] * 2 * BEATS
        assert told[-1] == "no step ended for 120 s (cluster.step_timeout)"

    def test_a_slow_rank_is_named_once_until_it_has_recovered(self) -> None:
        peers, told, spent = Peers(60, 1e9), [], 0.0
        for number in range(5 * BEATS):
            spent += (54 if number < 2 * BEATS + 1 or number >= 3 * BEATS else 30) / BEATS
            usual = 30 * number / BEATS
            assert not peers.verdict(beats(number, seconds=(usual, spent, usual)))
            told += peers.slow()
        assert told == 2 * ["rank 1 on a is slow: 54 s of its own work in 60 s, the others 30 s"]

    def test_little_work_accuses_nobody(self) -> None:
        peers = Peers(60, 1e9)
        for number in range(3 * BEATS):
            peers.verdict(beats(number, seconds=(0.6 * number / BEATS, 5.4 * number / BEATS)))
            assert not peers.slow()


def rank(number: int, port: int, folder: Path, work: Callable[[int, Watch], None], step_timeout: float) -> None:
    os.environ.update(RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = init_world("cpu")
    watch = Watch(world, RunFolder(folder), TIMEOUT, step_timeout)
    dist.barrier()
    (folder / f"begun-{number}").touch()
    work(number, watch)
    watch.close()
    close(world)


def wait_for_the_other(number: int, watch: Watch) -> None:
    if number == 1:
        time.sleep(WAIT_SECONDS)
    dist.all_reduce(torch.zeros(1))


def be_stopped(number: int, watch: Watch) -> None:
    if number == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.zeros(1))


def stop_the_first(number: int, watch: Watch) -> None:
    if number == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.zeros(1))


def be_done_early(number: int, watch: Watch) -> None:
    if number == 0:
        time.sleep(2.5 * TIMEOUT)


@pytest.fixture
def started(tmp_path: Path) -> Callable[..., list[BaseProcess]]:
    def start(work: Callable[[int, Watch], None], step_timeout: float = 1e6) -> list[BaseProcess]:
        port = free_port()
        both = [processes().Process(target=rank, args=(r, port, tmp_path, work, step_timeout)) for r in (0, 1)]
        for process in both:
            process.start()
        return both

    return start


def told(run: RunFolder) -> str:
    return "".join(file.read_text() for file in run.watch.iterdir())


def ended(process: BaseProcess) -> int | None:
    process.join(WAIT_SECONDS)
    return process.exitcode


def test_a_stopped_rank_is_lost(started: Callable[..., list[BaseProcess]], tmp_path: Path) -> None:
    first, second = started(be_stopped)
    assert ended(first) == EXIT_CODE
    second.kill()
    run = RunFolder(tmp_path)
    assert "rank 1 on " in told(run)
    assert "in all_reduce" in (run.stacks / "rank-0.txt").read_text()


def test_the_rank_with_the_store_is_missed_too(started: Callable[..., list[BaseProcess]], tmp_path: Path) -> None:
    first, second = started(stop_the_first)
    assert ended(second) == EXIT_CODE
    first.kill()
    assert "rank 0 gave no sign of life" in told(RunFolder(tmp_path))


def test_ranks_that_hang_tell_where(started: Callable[..., list[BaseProcess]], tmp_path: Path) -> None:
    assert [ended(process) for process in started(wait_for_the_other, 2 * TIMEOUT)] == [EXIT_CODE] * 2
    run = RunFolder(tmp_path)
    assert "no step ended for 3 s (cluster.step_timeout)" in told(run)
    stacks = [(run.stacks / f"rank-{number}.txt").read_text() for number in (0, 1)]
    assert "in all_reduce" in stacks[0]
    assert "in wait_for_the_other" in stacks[1]


def test_a_rank_that_is_done_is_not_missed(started: Callable[..., list[BaseProcess]], tmp_path: Path) -> None:
    assert [ended(process) for process in started(be_done_early)] == [0, 0]
    assert not RunFolder(tmp_path).watch.exists()
