"""Whether the ranks of a run are all there and get on, told by heartbeats beside the collectives.

A collective waits half an hour for a rank that says nothing, and then knows neither which one it was nor where the
others stood. So each rank writes a heartbeat into the process group's store; rank 0 reads all of them, the others read
rank 0's. Where a rank is silent, or no step ends, every rank writes down the stacks of its threads and ends its
process: whoever started the workers starts them anew. Beats are counted, not clocks compared: a machine that slept, or
a process that was held, accuses nobody when it wakes up.
"""

import faulthandler
import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from torch.distributed import DistError
from torch.distributed.distributed_c10d import _get_default_store

from pipeline.distributed import World
from pipeline.log import get_logger
from pipeline.run_folder import RunFolder

EXIT_CODE = 75
"""Of a process that its watch has ended: EX_TEMPFAIL of sysexits.h, which invites to try again."""
BEATS = 12
"""Heartbeats within the timeout."""
SLOW_FACTOR = 1.5
"""A rank that works so many times as long as the median of all is slow."""
SLOW_SHARE = 0.1
"""Share of the time that it must be busy with it: where all wait for something else, little work says nothing."""

SEND_SECONDS = 5.0
"""Longest wait for what this rank wrote to reach a store."""

PREFIX = "raydetr/beat/"
"""Of the keys of the store under which the ranks tell of themselves, by number."""
VERDICT = "raydetr/verdict"
"""Key under which a rank tells why all of them end."""

logger = get_logger(__name__)


@dataclass(frozen=True)
class Beat:
    """What a rank tells of itself."""

    host: str
    number: int
    """Of the heartbeat, from 1."""
    steps: int
    """Steps done since it began."""
    seconds: float
    """Time that it worked since then, waiting for no other rank."""
    is_last: bool = False
    """Whether it is done, and silent from now on."""


class Peers:
    """What follows from the heartbeats of some ranks, looked at once a beat of one's own.

    Args:
        timeout: seconds without a heartbeat after which a rank is lost.
        step_timeout: seconds in which no rank ends a step, after which the run hangs.
    """

    def __init__(self, timeout: float, step_timeout: float) -> None:
        self._timeout, self._step_timeout = timeout, step_timeout
        self._beats: dict[int, Beat | None] = {}
        self._silent: dict[int, int] = {}
        self._steps = self._without_step = self._looks = 0
        self._compared: dict[int, Beat] = {}
        self._slow: set[int] = set()

    def verdict(self, beats: Mapping[int, Beat | None]) -> str | None:
        """Why the run cannot go on, or None; `beats` has the newest of each rank, None where there is none yet."""
        for rank, beat in beats.items():
            is_new = beat is not None and (beat.is_last or beat != self._beats.get(rank))
            self._silent[rank] = 0 if is_new else self._silent.get(rank, 0) + 1
        self._beats = dict(beats)
        lost = [rank for rank, looks in self._silent.items() if looks >= BEATS]
        if lost:
            names = ", ".join(f"{rank} on {beat.host}" if (beat := beats[rank]) else str(rank) for rank in lost)
            return f"rank {names} gave no sign of life for {self._timeout:g} s (cluster.timeout)"
        steps = max((beat.steps for beat in beats.values() if beat is not None), default=0)
        self._without_step = 0 if steps != self._steps else self._without_step + 1
        self._steps = steps
        if self._without_step * self._timeout / BEATS >= self._step_timeout:
            return f"no step ended for {self._step_timeout:g} s (cluster.step_timeout)"
        return None

    def slow(self) -> list[str]:
        """The ranks that have become steadily slower than the others, once each, told about every timeout."""
        self._looks += 1
        if self._looks % BEATS:
            return []
        now = {rank: beat for rank, beat in self._beats.items() if beat is not None}
        before, self._compared = self._compared, now
        spent = {rank: beat.seconds - before[rank].seconds for rank, beat in now.items() if rank in before}
        if len(spent) < len(self._beats):
            return []
        usual = statistics.median_low(spent.values())
        slow = {
            rank for rank, seconds in spent.items() if seconds > max(SLOW_FACTOR * usual, SLOW_SHARE * self._timeout)
        }
        found, self._slow = slow - self._slow, slow
        return [
            f"rank {rank} on {now[rank].host} is slow: {spent[rank]:.0f} s of its own work in {self._timeout:g} s, the "
            f"others {usual:.0f} s"
            for rank in sorted(found)
        ]


class Watch:
    """Watches over the ranks of a run in threads of its own, until it is closed; a single rank is not watched.

    Args:
        world: this process; every rank makes a watch.
        run: its `watch` takes what a person should know, and `stacks` where the threads of each rank stood.
        timeout: as of `Peers`.
        step_timeout: as of `Peers`.
        sent: called before the process ends, when all that is to be known of it is written.
    """

    def __init__(
        self,
        world: World,
        run: RunFolder,
        timeout: float,
        step_timeout: float,
        sent: Callable[[], None] = lambda: None,
    ) -> None:
        self._rank, self._run, self._timeout, self._sent = world.rank, run, timeout, sent
        self._watched = range(world.size) if world.rank == 0 else range(1)
        self._peers = Peers(timeout, step_timeout)
        self._steps, self._seconds, self._number, self._unanswered = 0, 0.0, 0, 0
        self._closed = threading.Event()
        if world.size > 1:
            # A connection of its own: who waits for an answer holds it.
            self._store = _get_default_store().clone()  # type: ignore[attr-defined]
            self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._count)]
            for thread in self._threads:
                thread.start()
        else:
            self._threads = []

    def step_done(self) -> None:
        """A step has ended here."""
        self._steps += 1

    @contextmanager
    def working(self) -> Iterator[None]:
        """Its block is work of this rank alone, which waits for no other."""
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    def close(self) -> None:
        """This rank is done, or has met an error that is told otherwise: it watches no longer, and is not missed."""
        self._closed.set()
        for thread in self._threads:
            thread.join(self._timeout)

    def _beat(self) -> None:
        """Tell of this rank, and look at the others, until it is closed; what the store answers is an answer."""
        while not self._closed.wait(self._timeout / BEATS if self._number else 0):
            with suppress(DistError):  # what lasts is noticed by `_count`
                self._tell()
                told = self._heard(VERDICT)
                verdict = told or self._peers.verdict({rank: self._beat_of(rank) for rank in self._watched})
                self._unanswered = 0
                if verdict and not told:
                    self._store.set(VERDICT, verdict)
                    self._write(f"{verdict}; where the threads of all ranks stood: {self._run.stacks}")
                if verdict:
                    self._end(verdict)
                for line in self._peers.slow() if self._rank == 0 else []:
                    self._write(line)
        with suppress(DistError):
            self._tell(is_last=True)

    def _count(self) -> None:
        """End where the store, which lives with rank 0, answers no longer: its host may be gone without a word."""
        while not self._closed.wait(self._timeout / BEATS):
            self._unanswered += 1
            if self._unanswered > BEATS:
                verdict = f"rank 0 gave no sign of life for {self._timeout:g} s (cluster.timeout)"
                self._write(f"rank {self._rank}: {verdict}; where its threads stood: {self._run.stacks}")
                self._end(verdict)

    def _tell(self, *, is_last: bool = False) -> None:
        self._number += 1
        beat = Beat(socket.gethostname(), self._number, self._steps, self._seconds, is_last)
        self._store.set(f"{PREFIX}{self._rank}", json.dumps(asdict(beat)))

    def _beat_of(self, rank: int) -> Beat | None:
        told = self._heard(f"{PREFIX}{rank}")
        return Beat(**json.loads(told)) if told else None

    def _heard(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _write(self, line: str) -> None:
        with suppress(OSError):
            self._run.watch.mkdir(parents=True, exist_ok=True)
            with (self._run.watch / f"rank-{self._rank}.log").open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    def _end(self, verdict: str) -> None:
        """Write down where this rank's threads stand, and end the process: nothing else ends a collective."""
        if self._closed.is_set():
            return
        stacks = self._run.stacks / f"rank-{self._rank}.txt"
        with suppress(OSError):
            stacks.parent.mkdir(parents=True, exist_ok=True)
            with stacks.open("w", encoding="utf-8") as file:
                file.write(f"{verdict}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        logger.error("%s", verdict)
        sending = threading.Thread(target=self._sent, daemon=True)
        sending.start()
        sending.join(SEND_SECONDS)
        os._exit(EXIT_CODE)
