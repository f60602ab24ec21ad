"""Ray Train's workers, begun with as little as can be: each of its processes would import seconds of what nobody needs.

Its controller reads this module and no torch, its workers import `jobs.train` with what they train, and three of the
processes that Ray Train would start beside them are left out.
"""

import os
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.ray_constants import env_integer
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.exceptions import GetTimeoutError
from ray.train import BackendConfig
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend
from ray.train.constants import (
    DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S,
    TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S,
)
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.util import TrainingFramework
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from jobs.nodes import interface_of
from pipeline.log import get_logger

logger = get_logger(__name__)

ENVIRONMENT = {
    # How often the controller looks whether a worker failed or is done: 2 s by default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # There was room a moment ago: where there is none now, a node was lost, and fewer can begin.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    # A process that looks for nodes that go away, as `jobs.room.Notice` does.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Workers stay in the directory that the driver runs in, so that relative paths mean the same.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Telemetry is off.
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
"""What Ray Train is told by the driver's environment, where the user has not set it."""


class Trainer(DataParallelTrainer):  # type: ignore[misc]
    """Ray's trainer without the process for its datasets, of which there are none.

    The one that frees the workers' resources where the controller has died is left out, too, unless the driver is a
    trial of a sweep: another driver ends then, and Ray frees all that was its job's.
    """

    def fit(self) -> Any:
        get_or_create_autoscaling_coordinator()  # a cluster's first controller waits for it: so they start together
        return super().fit()

    def _create_default_callbacks(self) -> list[Any]:
        is_trial = ray.get_runtime_context().get_actor_id() is not None
        left_out = (DatasetsCallback,) if is_trial else (DatasetsCallback, PlacementGroupCleanerCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, left_out)]


@dataclass
class ProcessGroup(BackendConfig):  # type: ignore[misc]
    """The workers' process group of torch: Ray's, made without torch in the controller.

    It is over the network interface that holds the node's address: Gloo and NCCL would else take the one that the
    host's name resolves to, often 127.0.0.1, and hosts never meet.
    """

    backend: str
    """gloo or nccl."""
    timeout_s: int
    """Longest wait of a collective, in seconds."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Backend

    @property
    def framework(self) -> TrainingFramework:
        return TrainingFramework.TORCH


class _Backend(Backend):  # type: ignore[misc]
    """What `ray.train.torch.config._TorchBackend` does, in the workers alone."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        if len({node["NodeID"] for node in ray.nodes() if node["Alive"]}) > 1:
            worker_group.execute(_name_interface)
        worker_group.execute(_import)  # before a port is chosen: meanwhile another process could take it
        address, port = worker_group.execute_single(0, get_address_and_port)
        size = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(rank, _join, address, port, rank, size, backend_config)
                for rank in range(size)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        left = worker_group.execute_async(_leave, len(worker_group) > 1)
        limit = env_integer(TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S, DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S)
        try:
            ray.get(left, timeout=limit)
        except GetTimeoutError:
            logger.warning("the workers' process group has not ended after %d s", limit)


def _name_interface() -> None:
    """Tell Gloo and NCCL this node's interface, unless the user has."""
    interface = interface_of(ray.util.get_node_ip_address())
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if interface is not None:
            os.environ.setdefault(name, interface)


def _import() -> None:
    import ray.train.torch.config  # noqa: F401


def _join(address: str, port: int, rank: int, size: int, group: ProcessGroup) -> None:
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    _set_torch_distributed_env_vars()
    _setup_torch_process_group(group.backend, rank, size, "env://", group.timeout_s)


def _leave(destroys: bool) -> None:
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroys)
