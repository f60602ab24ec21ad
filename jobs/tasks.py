"""One pool of Ray tasks: some at a time, their results as they come, and one failure ends the others."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from jobs.cluster import check_alive, loss_told
from jobs.interrupt import in_thread
from pipeline.errors import UserError

Argument = TypeVar("Argument")
Result = TypeVar("Result")

CANCEL_SECONDS = 3
"""Seconds that cancelled tasks have to end by themselves; then their processes are killed, and given as many again."""
LOOK_SECONDS = 5
"""Seconds without a result after which Ray is asked whether it is still there."""


def run_tasks(
    task: Callable[[Argument], Result],
    arguments: Sequence[Argument],
    *,
    at_once: int,
    cpus: float = 1,
    gpus: float = 0,
    resources: Mapping[str, float] | None = None,
) -> Iterator[tuple[Argument, Result]]:
    """Run a task for each argument on the connected Ray.

    Args:
        task: runs in Ray's workers.
        arguments: one a task, begun in this order.
        at_once: most tasks at a time.
        cpus: CPUs that Ray sets aside for a task.
        gpus: GPUs that Ray sets aside for a task.
        resources: custom resources of a node that Ray sets aside for a task.

    Yields:
        Each argument with its result, in the order in which they end.

    Raises:
        UserError: a task met one. The others are cancelled before anything is raised.
    """

    def one(argument: Argument) -> Result:
        return task(argument)

    # By default, those of a trial of a sweep would be placed where the trial is, which has nothing for them.
    asked = {"num_cpus": cpus, "num_gpus": gpus, "resources": dict(resources or {})}
    remote = ray.remote(scheduling_strategy="DEFAULT", **asked)(one)
    waiting = list(reversed(arguments))
    running: dict[Any, Argument] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                argument = waiting.pop()
                running[remote.remote(argument)] = argument
            finished = ended_of(list(running), 1, LOOK_SECONDS)
            for done in finished:
                yield running.pop(done), result_of(done)
            if not finished:
                check_alive()
    finally:
        # What was cancelled may still write: the caller removes its folder only after this.
        if running:
            _cancel(list(running))


def _cancel(running: list[Any]) -> None:
    for force in (False, True):
        for reference in running:
            ray.cancel(reference, force=force)
        ended = ended_of(running, len(running), CANCEL_SECONDS)
        running = [reference for reference in running if reference not in ended]
        if not running:
            return


def ended_of(running: list[Any], at_least: int, seconds: float) -> list[Any]:
    """Those that have ended once there are so many or the time is up."""
    ended, _ = in_thread(lambda: ray.wait(running, num_returns=at_least, timeout=seconds), "ray-wait").result()
    return list(ended)


def result_of(reference: Any) -> Any:
    """The result of a task of the connected Ray that has ended; raises the `UserError` that it met as it was."""
    try:
        with loss_told():
            return in_thread(lambda: ray.get(reference), "ray-get").result()
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise type(error.cause)(str(error.cause)) from None
        raise
