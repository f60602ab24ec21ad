"""Room for workers and tasks on the connected Ray: how many can begin, and when more could."""

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

import ray
from ray._private.state import state  # what is said of draining nodes and of each node's resources stands nowhere else
from ray.autoscaler.sdk import request_resources

from jobs.cluster import check_alive, device_of, fits, resources_of, spelled
from jobs.interrupt import in_thread
from pipeline.config.sections import ClusterSection, Config
from pipeline.errors import UserError
from pipeline.log import get_logger

logger = get_logger(__name__)

ANSWER_SECONDS = 2.0
"""A node that does not answer for so long is counted as gone, long before Ray's head knows."""
LOOK_SECONDS = 1.0
"""Between two looks for room."""
GROW_LOOK_SECONDS = 5.0
"""Between two looks for room for more workers than there are."""
NOTICE_LOOK_SECONDS = 2.0
"""Between two looks for nodes that go away."""
GROW_SECONDS = 15.0
"""It must have been there for so long: what comes and goes is not worth a restart."""
SETTLE_SECONDS = 5.0
"""What ended workers held is free after a moment: for so long fewer workers than could be are not begun."""


def room(worker: dict[str, float], held: int = 0) -> int:
    """Workers that fit on the nodes that answer and stay, beside what else runs on Ray.

    Args:
        worker: the resources of one.
        held: workers that run already, and are counted.
    """
    nodes, free = in_thread(lambda: (ray.nodes(), _free(worker)), "ray-nodes").result()
    going = in_thread(state.get_draining_nodes, "ray-draining").result()
    alive = [node for node in nodes if node["Alive"] and node["NodeID"] not in going]
    with ThreadPoolExecutor(max_workers=32) as pool:
        answering = [node for node, answers in zip(alive, pool.map(_answers, alive), strict=True) if answers]
    return min(sum(fits(node["Resources"], worker) for node in answering), held + free)


def is_free(worker: dict[str, float]) -> bool:
    """Whether there is room for one now."""
    return in_thread(partial(_free, worker), "ray-resources").result() > 0


def _free(worker: dict[str, float]) -> int:
    """How many fit beside all that runs, each on one node."""
    return sum(fits(node, worker) for node in state.available_resources_per_node().values())


def wait_for_room(
    cluster: ClusterSection,
    sizes: list[int],
    worker: dict[str, float],
    step: str = "train",
    on_look: Callable[[], None] = lambda: None,
) -> int:
    """Workers to begin with: the most that have room, once one of the sizes has it.

    Args:
        cluster: `cluster.wait` limits the wait; an autoscaler is asked for the nodes.
        sizes: numbers of workers that may be, the greatest first.
        worker: the resources of one.
        step: whose they are.
        on_look: called before each look that follows one without room.

    Raises:
        UserError: `cluster.wait` is over.
    """
    began, is_told = time.monotonic(), False
    try:
        while True:
            found, waited = room(worker), time.monotonic() - began
            fitting = [size for size in sizes if size <= found]
            if fitting and (fitting[0] == sizes[0] or waited >= SETTLE_SECONDS):
                return fitting[0]
            if cluster.wait is not None and waited >= cluster.wait and not fitting:
                raise UserError(
                    f"{step}: after {cluster.wait:g} s (cluster.wait) the Ray cluster has room for {found} of "
                    f"{sizes[-1]} workers: add nodes with {spelled(worker)} for each, or run the same command later"
                )
            if waited >= SETTLE_SECONDS and not is_told:
                is_told = True
                logger.warning(
                    "%s: waiting for room for %d workers; Ray has it for %d; each takes %s",
                    *(step, sizes[-1], found, spelled(worker)),
                )
                request_resources(bundles=[worker] * sizes[-1])
            check_alive()
            time.sleep(LOOK_SECONDS)
            on_look()
    finally:
        if is_told:  # an autoscaler keeps what nobody takes back; of a Ray that may be gone
            in_thread(partial(request_resources, bundles=[]), "ray-request")


class Growth:
    """Whether more workers could go on with a run than there are: room that has been there for a while.

    Args:
        config: the pipeline.
        workers: that run now.
    """

    def __init__(self, config: Config, workers: int) -> None:
        self._larger = [size for size in config.world_sizes if size > workers]
        self._worker = resources_of(config.cluster, device_of(config.cluster))
        self._workers = workers
        self._looked = time.monotonic()
        self._since: float | None = None

    def is_due(self) -> bool:
        """Whether it is; called often, until it is."""
        now = time.monotonic()
        if not self._larger or now - self._looked < GROW_LOOK_SECONDS:
            return False
        self._looked = now
        if room(self._worker, self._workers) < self._larger[-1]:
            self._since = None
        elif self._since is None:
            self._since = now
        return self.has_room and now - (self._since or now) >= GROW_SECONDS

    @property
    def has_room(self) -> bool:
        """Whether there was, at the last look: what else would take it for a while waits."""
        return self._since is not None


class Notice:
    """Whether Ray was told that a node with workers goes away: a preemptible machine, a pod that is moved.

    Args:
        worker: the resources of one.
    """

    def __init__(self, worker: dict[str, float]) -> None:
        self._worker = worker
        self._looked = time.monotonic()

    def hosts(self) -> list[str]:
        """Those of the nodes; called often, until there are some."""
        now = time.monotonic()
        if now - self._looked < NOTICE_LOOK_SECONDS:
            return []
        self._looked = now
        going = in_thread(state.get_draining_nodes, "ray-draining").result()
        if not going:
            return []
        nodes, free = in_thread(lambda: (ray.nodes(), state.available_resources_per_node()), "ray-nodes").result()
        return [node["NodeManagerHostname"] for node in nodes if node["NodeID"] in going and self._is_used(node, free)]

    def _is_used(self, node: dict[str, Any], free: dict[str, dict[str, float]]) -> bool:
        left = fits(free.get(node["NodeID"], {}), self._worker)
        return bool(node["Alive"]) and left < fits(node["Resources"], self._worker)


def _answers(node: dict[str, Any]) -> bool:
    try:
        with closing(
            socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=ANSWER_SECONDS)
        ):
            return True
    except OSError:
        return False
