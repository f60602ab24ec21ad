"""What ends a command from outside: SIGINT and SIGTERM, the first in order, the second at once; and the loss of Ray."""

import atexit
import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from types import FrameType
from typing import TypeVar

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # Linux, sys/prctl.h
SIGNALS = (signal.SIGINT, signal.SIGTERM)

Result = TypeVar("Result")

_received: "Interrupted | None" = None


class Interrupted(BaseException):
    """The user, or whoever runs the machine, wants the command to end; its notes say what became of the work.

    No `Exception`, and no `KeyboardInterrupt` either: what catches those must not keep the command alive.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class RayLostError(Exception):
    """Ray, all of it or its head, has ended under the command."""


def end_in_order() -> None:
    """From now on a signal raises `Interrupted`, once; called by the entry point, in the main thread.

    What loses its parent below this process becomes its child, so that `end_descendants` misses nothing: Ray's agents
    outlive their node.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    atexit.register(_hear_no_more)
    for number in SIGNALS:
        signal.signal(number, _first)


def _hear_no_more() -> None:
    """The work is over: while Python takes itself down it has no handlers, and a signal would kill it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def received() -> Interrupted | None:
    """What the first signal has raised, if one has come: an import that it cuts may end in an ImportError instead."""
    return _received


def _first(number: int, frame: FrameType | None) -> None:
    global _received
    for other in SIGNALS:
        signal.signal(other, _second)
    _received = Interrupted(number)
    raise _received


def _second(number: int, frame: FrameType | None) -> None:
    end_descendants(wait_seconds=0)
    os._exit(128 + number)


@contextmanager
def at_first_signal(call: Callable[[], None], wait_seconds: float) -> Iterator[Callable[[], None]]:
    """In the block, the first signal has a thread begin a call at once, before anything is unwound.

    Args:
        call: what comes first of all, as whoever sent the signal may kill this process before it has ended in order.
        wait_seconds: longest wait for the call at the end of the block.

    Yields:
        What begins the call without a signal, unless it has begun.
    """
    wanted: SimpleQueue[bool] = SimpleQueue()  # a handler may put into it whatever it cuts into
    began = False

    def begin() -> None:
        nonlocal began
        began = True
        wanted.put(True)

    def first(number: int, frame: FrameType | None) -> None:
        begin()
        _first(number, frame)

    thread = threading.Thread(target=lambda: call() if wanted.get() else None, name="at-first-signal", daemon=True)
    thread.start()
    ours = [number for number in SIGNALS if signal.getsignal(number) is _first]
    for number in ours:
        signal.signal(number, first)
    try:
        yield begin
    finally:
        if began:
            thread.join(wait_seconds)
        else:
            for number in ours:
                signal.signal(number, _first)
            wanted.put(False)


def in_thread(call: Callable[[], Result], name: str) -> "Future[Result]":
    """Begin a call in a thread that does not keep the process alive.

    What waits long in Ray's client is called so and waited for from the main thread: the client looks for signals by
    itself while it waits there, and an `Interrupted` raised inside of it is lost or comes out as a `SystemError`.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


@contextmanager
def held_back() -> Iterator[None]:
    """Hold signals back until the block ends, which must not be cut in the middle, and keep the handlers as they were.

    Whatever handlers the block sets (Ray takes SIGTERM), a signal that comes meanwhile is not lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for held in SIGNALS:
        signal.signal(held, lambda number, frame: None)
    with _numbers_of_signals() as came:
        try:
            yield
        except SystemExit:  # what Ray's own handler does
            came.append(signal.SIGTERM)
        finally:
            for held, handler in before.items():
                signal.signal(held, handler)
    for number in came:
        if number in SIGNALS:
            signal.raise_signal(number)
            break


@contextmanager
def _numbers_of_signals() -> Iterator[list[int]]:
    """The numbers of the signals that come in the block, known after it."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    came: list[int] = []
    try:
        yield came
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        came += os.read(reading, 4096)
        os.close(reading)


def end_descendants(wait_seconds: float = 3.0) -> None:
    """Kill all processes below this one, and wait until they are gone."""
    processes = psutil.Process().children(recursive=True)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, wait_seconds)
