"""The Ray that a pipeline runs on: the one of a submitted job, one that is given, or one started here."""

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import chdir, closing, contextmanager
from pathlib import Path
from typing import Literal

import ray
from ray.exceptions import ActorDiedError, LocalRayletDiedError

from jobs.interrupt import Interrupted, RayLostError, end_descendants, held_back, in_thread
from pipeline.config.sections import RAYS_OWN, ClusterSection
from pipeline.errors import UserError
from pipeline.log import get_logger

logger = get_logger(__name__)

HOME = Path(__file__).resolve().parents[1]
"""Holds the packages that the driver runs. Every worker uses them, whatever is installed on its host."""
LEAVE_SECONDS = 2.0
"""Longest wait for Ray to stop when the command is to end; what is still there then is killed."""
PACKAGES = [str(HOME / name) for name in ("jobs", "model", "pipeline")]


@contextmanager
def connected(cluster: ClusterSection) -> Iterator[None]:
    """Be connected to Ray inside the block; what was started for it is stopped at its end.

    Raises UserError where the address does not answer or the cluster is too small for `cluster.workers`. A
    `RayLostError` in the block leaves the client as it is: it would wait for its cluster for minutes.
    """
    if ray.is_initialized():
        yield
        return
    try:
        # Cut while it starts, Ray would leave processes behind; and the folder that it starts in comes first where
        # workers look for modules: a user's may hold a `model.py`.
        with held_back(), chdir(HOME):
            _connect(cluster)
        _check_size(cluster)
        yield
    except RayLostError:
        end_descendants()
        raise
    except Interrupted:
        # On a busy machine Ray takes longer than the user, or the one who stops the machine, waits.
        leaving = threading.Thread(target=ray.shutdown, daemon=True)
        leaving.start()
        leaving.join(LEAVE_SECONDS)
        end_descendants()
        raise
    except BaseException:
        _leave()
        raise
    _leave()


def check_alive(lost_seconds: float = 10.0, node_lost_seconds: float = 5.0) -> None:
    """Raise `RayLostError` where the head, or the node, of the connected Ray answers nobody for so long.

    A node that has died is found 15 seconds later by the head, and the client then ends this process without a word.
    """
    _check_answers("head", ray.get_runtime_context().gcs_address, lost_seconds)
    here = ray.get_runtime_context().get_node_id()
    for node in in_thread(ray.nodes, "ray-nodes").result():
        if node["NodeID"] == here:
            address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
            _check_answers("node", address, node_lost_seconds)


def _check_answers(what: str, address: str, lost_seconds: float) -> None:
    host, _, port = address.rpartition(":")
    end = time.monotonic() + lost_seconds
    while True:
        try:
            with closing(socket.create_connection((host, int(port)), timeout=2)):
                return
        except OSError as error:
            if time.monotonic() > end:
                raise RayLostError(f"Ray has ended: its {what} at {address} does not answer ({error})") from None
        time.sleep(1)


@contextmanager
def loss_told() -> Iterator[None]:
    """What Ray raises where its node beside the command, or what ran there, has died becomes a `RayLostError`."""
    try:
        yield
    except (LocalRayletDiedError, ActorDiedError) as error:
        told = str(error).strip().splitlines()
        raise RayLostError(
            f"Ray has ended under the command, or what ran there ({told[0] if told else error!r})"
        ) from None


def _leave() -> None:
    ray.shutdown()
    end_descendants()


def _connect(cluster: ClusterSection) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"logging_level": logging.WARNING, "log_to_driver": False}
    address = cluster.address or os.environ.get("RAY_ADDRESS") or None
    if cluster.address is None and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        ray.init(**quiet)  # inside a submitted job: its cluster, with the working directory it was submitted with
    elif address is None:
        # Ray guards what it starts with a token. Without this one it would leave one in the home folder, with which the
        # user's next `ray start --head` would refuse its clients.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        cpus = _local_cpus(cluster)
        logger.info("starting Ray on this machine")
        try:
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        except Exception as error:  # Ray tells it in many kinds: a slow disk, a path too long for a socket, no memory
            told = " ".join(str(error).split())
            raise UserError(
                f"Ray cannot be started on this machine ({told[:300]}); if it is slow or low on memory, try again, "
                "and if the path of its files is too long, set RAY_TMPDIR to a short one such as /tmp"
            ) from error
    else:
        _join(address, "cluster.address" if cluster.address else "RAY_ADDRESS", quiet)


def device_of(cluster: ClusterSection) -> str:
    """`cuda` or `cpu`: what `cluster.device: auto` means on the connected Ray."""
    if cluster.device != "auto":
        return cluster.device
    return "cuda" if ray.cluster_resources().get("GPU", 0) >= cluster.least_workers else "cpu"


def resources_of(cluster: ClusterSection, device: str) -> dict[str, float]:
    """What Ray sets aside for one training worker on `cpu` or `cuda`."""
    return {"CPU": cluster.cpus_per_worker} | ({"GPU": 1.0} if device == "cuda" else {}) | cluster.resources.train


def fits(resources: Mapping[str, float], need: Mapping[str, float]) -> int:
    """How often a need fits into resources."""
    return min(int(resources.get(name, 0.0) / amount + 1e-6) for name, amount in need.items())


def check_resources(
    cluster: ClusterSection, step: Literal["shard", "train", "evaluate"], need: Mapping[str, float], count: int = 1
) -> None:
    """Raise a UserError where `cluster.resources` asks for what too few nodes have, unless `cluster.wait` waits."""
    asked = getattr(cluster.resources, step)
    if not asked or cluster.wait is not None:
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    have = sum(fits(node, need) for node in nodes)
    if have < count:
        named = {name for node in nodes for name in node if name not in RAYS_OWN and not name.startswith("node:")}
        raise UserError(
            f"cluster.resources.{step} {json.dumps(asked)}: of {count} that each need {spelled(need)} on one node, the "
            f"Ray cluster has room for {have}, and its nodes have the resources {', '.join(sorted(named)) or '(none)'}:"
            " mend it, start nodes with `ray start --resources`, or wait for some with cluster.wait"
        )


def spelled(need: Mapping[str, float]) -> str:
    """Resources as people read them."""
    return ", ".join(f"{name} {amount:g}" for name, amount in need.items())


def _local_cpus(cluster: ClusterSection) -> int:
    """The CPUs of this machine, if they are enough; more would be waited for for ever."""
    have, need = len(os.sched_getaffinity(0)), cluster.least_workers * cluster.cpus_per_worker
    if need > have:
        raise UserError(_too_few_cpus(cluster, f"this machine has {have}") + ", or set cluster.address to a cluster's")
    return have


def _join(address: str, key: str, quiet: dict[str, int | bool]) -> None:
    mend = f"start one with `ray start --head`, or remove {key} to start Ray here"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address != "auto" and (not host or not port.isdigit() or "/" in host):
        raise UserError(f"{key} {address}: must be host:port, ray://host:port or auto, such as head:6379")
    if address != "auto":
        try:
            with closing(socket.create_connection((host.strip("[]"), int(port)), timeout=5)):
                pass
        except OSError as error:
            raise UserError(f"{key} {address}: no Ray answers ({error}); {mend}") from error
    try:
        ray.init(address=address, runtime_env={"py_modules": PACKAGES}, **quiet)
    except (ConnectionError, RuntimeError) as error:
        raise UserError(f"{key} {address}: no Ray answers ({error}); {mend}") from error


def _too_few_cpus(cluster: ClusterSection, have: str) -> str:
    need = cluster.least_workers * cluster.cpus_per_worker
    return (
        f"cluster.workers {cluster.least_workers} x cluster.cpus_per_worker {cluster.cpus_per_worker:g} need {need:g}"
        f" CPUs and {have}; lower one of them"
    )


def _check_size(cluster: ClusterSection) -> None:
    if cluster.wait is not None:
        return
    have = ray.cluster_resources()
    need_cpus = cluster.least_workers * cluster.cpus_per_worker
    if have.get("CPU", 0) < need_cpus:
        raise UserError(_too_few_cpus(cluster, f"the Ray cluster has {have.get('CPU', 0):g}") + ", or add nodes")
    if cluster.device == "cuda" and have.get("GPU", 0) < cluster.least_workers:
        raise UserError(
            f"cluster.device cuda with {cluster.least_workers} workers needs as many GPUs and the Ray cluster has"
            f" {have.get('GPU', 0):g}; lower cluster.workers, add nodes or use cluster.device auto"
        )
    asked = cluster.resources
    check_resources(cluster, "shard", {"CPU": 1.0} | asked.shard)
    check_resources(cluster, "train", resources_of(cluster, device_of(cluster)), cluster.least_workers)
    check_resources(cluster, "evaluate", {"CPU": cluster.cpus_per_worker} | asked.evaluate)
