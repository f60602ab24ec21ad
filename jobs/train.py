"""Trains with Ray Train's workers, each of which runs `pipeline.train.train`.

Ray places the workers and makes their process group. Where one is lost, or more have room, they are started anew, as
many as there is room for; where training stands is known from the run's own checkpoints, so nothing is reported to Ray.
"""

import math
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any

from ray.train import (
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)

from jobs.cluster import check_alive, device_of, loss_told, resources_of
from jobs.interrupt import Interrupted, in_thread
from jobs.room import Growth, Notice, wait_for_room
from jobs.worker_group import ENVIRONMENT, ProcessGroup, Trainer
from model.ops.operator import compiled
from pipeline.checkpoint.state import latest
from pipeline.config.sections import Config
from pipeline.data.manifest import Manifest
from pipeline.errors import UserError
from pipeline.log import get_logger, outcome
from pipeline.run_folder import WEIGHTS, RunFolder
from pipeline.tracking.spool import SpoolReader
from pipeline.train.initial import hindrance
from pipeline.train.run import TrainJob, resume_point
from pipeline.train.scores import is_exhausted, scored
from pipeline.train.stop import end_of

logger = get_logger(__name__)

POLL_SECONDS = 1.0
"""Seconds between two calls of `on_poll`."""
STOP_SECONDS = 4.5
"""Longest wait, when the command is to end, for the step in flight and its checkpoint."""
START_SECONDS = 30.0
"""Workers without a point of the curves count as starting for so long: there is no step in flight to wait for."""
LOST_SECONDS = 2.0
"""After workers were lost, before room is looked for: their host may be about to follow."""
STOP_POLL_SECONDS = 0.1
"""Seconds between two looks for that checkpoint."""

NO_BETTER = "not been better for train.patience checkpoints"


def train(
    config: Config,
    manifest: Manifest,
    on_poll: Callable[[bool], None] = lambda keeps_room: None,
    sync: Callable[[], None] = lambda: None,
) -> Path:
    """Train on the connected Ray to the end of the schedule, from the run's newest checkpoint.

    Args:
        config: the pipeline; `cluster.workers` workers run it, restarted `train.max_restarts` times.
        manifest: of the training split.
        on_poll: called about every second while workers train, or room for them is waited for, in this thread; with
            whether what room there is is kept for workers.
        sync: makes the run's folder alike here and where the workers have it.

    Returns:
        The checkpoint of the last step.

    Raises:
        UserError: the run is another one, a worker met one (it is not tried again), or the compiled operator is
            required and missing.
        ray.train.TrainingFailedError: workers were lost once more than `train.max_restarts` times without a new
            checkpoint in between.
    """
    device = device_of(config.cluster)
    if config.cluster.require_compiled:
        refuse_plain_operator(device)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    job = make_job(config, manifest)
    found = resume_point(job, manifest)
    is_over = found is not None and found[1].step == config.train.total_steps(len(manifest.samples))
    if found is not None and (is_over or is_no_better(config)):
        logger.info(outcome("train", config.folder.place(found[0]), is_new=False))
        return found[0]
    if found is None and (told := hindrance(job.model, job.train, len(manifest.samples))):
        logger.warning("train: %s", told)
    restarts = 0
    while True:
        worker = resources_of(config.cluster, device)
        workers = wait_for_room(config.cluster, config.world_sizes, worker, on_look=partial(on_poll, True))
        before = latest(config.folder.checkpoints)
        going_on = f", going on from {config.folder.place(before)}" if before else ""
        logger.info("train: starting %d workers%s", workers, going_on)
        try:
            result = _fit(config, _make_trainer(config, job, device, workers), workers, on_poll, sync)
        except TrainingFailedError as error:
            restarts = 1 if latest(config.folder.checkpoints) != before else restarts + 1
            if restarts > config.train.max_restarts:
                raise
            logger.warning(
                "train: %s; restart %d of %d (train.max_restarts)",
                *(_first_line(error), restarts, config.train.max_restarts),
            )
            time.sleep(LOST_SECONDS)
        else:
            if result is not None:
                return _checkpoint_of(result)
            last = latest(config.folder.checkpoints)
            if last is not None and is_no_better(config):
                why = "been less than that of other trials" if config.folder.pruned.exists() else NO_BETTER
                logger.info("train: %s has %s", config.register_.metric, why)
                return last


def is_no_better(config: Config) -> bool:
    """Whether there are checkpoints, whose scores were no better for `train.patience` of them, or behind a sweep's."""
    patience, run = config.train.patience, config.folder
    if latest(run.checkpoints) is None:
        return False
    return run.pruned.exists() or (
        patience is not None and is_exhausted(scored(run, config.register_.metric, config.evaluate.subset), patience)
    )


def _checkpoint_of(result: dict[str, str]) -> Path:
    """The checkpoint that training ended with; raises what it ended with otherwise."""
    if "user_error" in result:
        raise UserError(result["user_error"])
    if "stopped" in result:
        stopped = Interrupted(signal.SIGTERM)
        stopped.add_note(result["stopped"])
        raise stopped
    return Path(result["checkpoint"])


def _first_line(error: TrainingFailedError) -> str:
    """What Ray says of a failure, without the stacks of its workers."""
    failures = getattr(error, "worker_failures", None) or {None: getattr(error, "controller_failure", error)}
    rank, failure = next(iter(failures.items()))
    told = next((line.strip() for line in reversed(str(failure).splitlines()) if line.strip()), repr(failure))
    return f"{f'rank {rank}' if rank is not None else 'the workers'} failed ({told[:300]})"


def make_job(config: Config, manifest: Manifest) -> TrainJob:
    """What a pipeline trains on a split."""
    return TrainJob(
        model=config.model_for(manifest.labels.num_classes),
        train=config.train,
        shards=manifest.folder,
        out=config.folder,
        on_error=config.dataset.on_error,
        cache=manifest.cache,
        metric=config.register_.metric,
        subset=config.evaluate.subset,
        ends=end_of(config.train.max_hours),
        timeout=config.cluster.timeout,
        step_timeout=config.cluster.step_timeout,
        root=Path.cwd(),
        parent=config.folder.parent / WEIGHTS if config.train.init.is_registered else None,
    )


def _make_trainer(config: Config, job: TrainJob, device: str, workers: int) -> Trainer:
    settings = {
        "job": job,
        "device": device,
        "timeout": config.cluster.collective_timeout,
        "threads": max(1, int(config.cluster.cpus_per_worker)),
        "require_compiled": config.cluster.require_compiled,
    }
    return Trainer(
        partial(_worker, settings),  # as `train_loop_config`, the controller would read them, and import torch for it
        backend_config=ProcessGroup(
            backend="nccl" if device == "cuda" else "gloo",
            timeout_s=math.ceil(config.cluster.collective_timeout),
        ),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=device == "cuda",
            resources_per_worker=resources_of(config.cluster, device),
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(config.folder),  # every node writes there, and Ray refuses a folder that is not shared
            # `train` begins anew, with as many as there is room for.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def refuse_plain_operator(device: str) -> None:
    """Raise a UserError that names this host where the attention operator is not compiled for a type of device."""
    if not compiled(device):
        raise UserError(
            f"cluster.require_compiled is true, and there is no compiled attention operator for {device} on"
            f" {socket.gethostname()}: build it there as `raydetr doctor` says, or set cluster.require_compiled: false"
            " to train with plain torch's"
        )


def _fit(
    config: Config, trainer: Trainer, workers: int, on_poll: Callable[[bool], None], sync: Callable[[], None]
) -> dict[str, str] | None:
    """What rank 0 returns; None where it ended in order because more or fewer workers can go on, or none need to.

    Training runs in a thread, so that `on_poll` is called in the one that asked.
    """
    run = config.folder
    run.stop.unlink(missing_ok=True)
    sync()
    began = time.monotonic()
    points = SpoolReader(run.train_spool, run.train_spool.stat().st_size if run.train_spool.exists() else 0)
    seen = _Seen(run.watch)
    growth, ends = Growth(config, workers), False
    notice = Notice(resources_of(config.cluster, device_of(config.cluster)))
    future = in_thread(trainer.fit, "ray-train")
    try:
        while not wait([future], POLL_SECONDS).done:
            on_poll(growth.has_room)
            check_alive()
            seen.tell()
            if ends:
                continue
            if hosts := notice.hosts():
                logger.warning("train: %s will go away: one more checkpoint, then on without", ", ".join(hosts))
            elif growth.is_due():
                logger.info("train: there is room for more workers")
            elif not is_no_better(config):
                continue
            ends = True
            run.stop.touch()
    except Interrupted as interrupted:
        # A run that goes on writes no points of the steps that it does again.
        has_begun = bool(points.read()) or time.monotonic() - began > START_SECONDS
        interrupted.add_note(_stop_workers(future, run, has_begun=has_begun))
        raise
    sync()
    seen.tell()
    with loss_told():
        result: dict[str, str] = future.result().return_value
    return None if "stopped" in result and ends else result


class _Seen:
    """What the workers write from now on about each other, each in a file of the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets = {log: log.stat().st_size for log in folder.glob("*.log")}

    def tell(self) -> None:
        """Tell what is new."""
        for log in sorted(self._folder.glob("*.log")):
            with log.open("rb") as file:
                file.seek(self._offsets.get(log, 0))
                for line in file:
                    if line.endswith(b"\n"):
                        logger.warning("train: %s", line.decode(errors="replace").rstrip())
                        self._offsets[log] = self._offsets.get(log, 0) + len(line)


def _stop_workers(future: "Future[Any]", run: RunFolder, *, has_begun: bool) -> str:
    """Ask the workers for a checkpoint after the step in flight; where training goes on, for people."""
    end = time.monotonic() + (STOP_SECONDS if has_begun else 0)
    # One that is being written now is of an earlier step.
    before = {latest(run.checkpoints), *(path.with_suffix("") for path in run.checkpoints.glob("checkpoint-*.tmp"))}
    run.stop.touch()
    while latest(run.checkpoints) in before and time.monotonic() < end and not wait([future], STOP_POLL_SECONDS).done:
        pass
    run.stop.unlink(missing_ok=True)
    newest = latest(run.checkpoints)
    return f"training goes on from {run.place(newest)}" if newest else "training begins anew"


def _worker(settings: dict[str, Any]) -> dict[str, str]:
    """What one worker does. A `UserError` is returned: raised, it would only be met again by each restart."""
    import torch

    from pipeline.distributed import init_world, together
    from pipeline.log import set_up_logging
    from pipeline.train.loop import train as train_here
    from pipeline.train.stop import StoppedError

    torch.set_num_threads(settings["threads"])
    try:
        world = init_world(settings["device"], settings["timeout"])
        set_up_logging(world.rank)
        if settings["require_compiled"]:
            together(world, lambda: refuse_plain_operator(settings["device"]))
        return {"checkpoint": str(train_here(settings["job"], world))}
    except StoppedError as stopped:
        return {"stopped": str(stopped)}
    except UserError as error:
        return {"user_error": str(error)}
