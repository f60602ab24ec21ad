"""Uploads what a run has for MLflow and a server that was away has not got."""

from pathlib import PurePath

from jobs.console import make_console
from pipeline.config.sections import Config
from pipeline.errors import UserError
from pipeline.files import held
from pipeline.log import outcome
from pipeline.registry.register import VERSION, Registration, register_version
from pipeline.tracking.outbox import Operation
from pipeline.tracking.tracker import Tracker


def open_tracker(config: Config, *, reach: bool = True) -> Tracker:
    """The MLflow run of a pipeline run, with all that its outbox may hold; `reach` as of `Tracker`."""
    return Tracker(
        config.tracking_uri,
        config.tracking.experiment,
        config.name,
        config.folder.mlflow_run,
        required=config.tracking.required,
        reach=reach,
        handlers={VERSION: make_version},
    )


def make_version(tracker: Tracker, operation: Operation) -> Registration:
    """Make the version that the outbox holds, now or later, and say which one it became."""
    registration = register_version(tracker, operation)
    checkpoint = PurePath(operation.body["checkpoint"]).name
    version = f"{registration.name} version {registration.version}  {checkpoint}  ({registration.note})"
    make_console().print(outcome("register", version, is_new=registration.is_new))
    return registration


def sync(config: Config, *, wait: bool = False) -> None:
    """Upload what waits in the run's outbox, and say how much it was.

    Args:
        config: the pipeline.
        wait: wait for another command that works on the run, instead of being refused.

    Raises:
        UserError: there is no such run.
        TrackingError: the server is away still.
    """
    if not config.folder.outbox.is_dir():
        raise UserError(f"{config.folder}: no command has written anything for MLflow there; see name and runs")
    with held(config.folder.lock, f"the run {config.name}", wait=wait):
        tracker = open_tracker(config)
        waiting = tracker.waiting()
        tracker.settle(patience=0)
    uploads = f"{waiting} upload{'' if waiting == 1 else 's'}" if waiting else "nothing waits"
    make_console().print(f"{outcome('track sync', uploads, is_new=waiting > 0)}\n{tracker.page}")
