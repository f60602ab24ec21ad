"""Uploads what a run has for MLflow and a server that was away has not got."""

import shlex
import socket
import sys
from collections.abc import Mapping
from pathlib import PurePath

import yaml

from jobs.console import make_console
from pipeline.config.address import without_secrets
from pipeline.config.load import dump_config
from pipeline.config.sections import Config
from pipeline.data.manifest import Manifest
from pipeline.errors import UserError
from pipeline.files import read_json, write_whole
from pipeline.log import outcome
from pipeline.mirror import driver_mirror
from pipeline.registry.parent import PARENT_TAG, read_parent
from pipeline.registry.register import VERSION, Registration, register_version
from pipeline.run_folder import RunFolder
from pipeline.tracking.outbox import Operation
from pipeline.tracking.provenance import code_version, user
from pipeline.tracking.tracker import Tracker

NEST = "nest"
"""Kind of the operations of the outbox that put a trial's run below its sweep's."""


def open_tracker(config: Config, *, reach: bool = True) -> Tracker:
    """The MLflow run of a pipeline run, with all that its outbox may hold; `reach` as of `Tracker`."""
    return Tracker(
        config.tracking_uri,
        config.tracking.experiment,
        config.name,
        config.folder.mlflow_run,
        where=str(config.folder) if config.folder.store else None,
        required=config.tracking.required,
        reach=reach,
        handlers={VERSION: make_version, NEST: _nest},
    )


def nest(tracker: Tracker, sweep: str) -> None:
    """Show a trial's run below that of its sweep, whose folder lies beside that of the trial."""
    tracker.request(NEST, sweep, {})


def _nest(tracker: Tracker, operation: Operation) -> None:
    folder = tracker.outbox.folder.parent.with_name(operation.subject)
    file = RunFolder(folder).mlflow_run
    parent = read_json(file, "record of an MLflow run")["run_id"] if file.exists() or not folder.is_dir() else None
    if parent is None:
        raise OSError(f"the MLflow run of {folder} is not made yet")
    tracker.client.set_tag(tracker.run_id, "mlflow.parentRunId", parent)


def tell_about(tracker: Tracker, config: Config, manifests: Mapping[str, Manifest]) -> None:
    """What the run's page says: what is trained on which data by whom, with what command, code and configuration.

    Args:
        tracker: the MLflow run.
        config: the pipeline.
        manifests: of the splits that are used, by name.
    """
    code = code_version()
    tags = {
        "mlflow.note.content": described(config, manifests["train"]),
        "mlflow.user": user(),
        "mlflow.source.name": without_secrets(shlex.join(["raydetr", *sys.argv[1:]])),
        "mlflow.source.type": "JOB",
        "raydetr.host": socket.gethostname(),
        **{f"raydetr.{name}": value for name, value in code.items()},
    }
    if "git_commit" in code:
        tags["mlflow.source.git.commit"] = code["git_commit"]
    if config.train.init.is_registered and (parent := read_parent(config.folder.parent)):
        tags[PARENT_TAG] = parent
    tracker.log_tags(tags)
    for split, context in (("train", "training"), ("val", "validation")):
        if split in manifests:
            name = f"{config.dataset.name} {split}"
            tracker.log_dataset(context, name, manifests[split].digest, str(manifests[split].folder))
    file = config.folder.path / "config.yaml"
    write_whole(file, yaml.safe_dump(dump_config(config), sort_keys=False).encode())
    tracker.log_artifacts(file)


def described(config: Config, manifest: Manifest) -> str:
    """A few words of Markdown on what is trained, on what and how."""
    model, train, images = config.model, config.train, len(manifest.samples)
    names = {"dilation": "dilated stage 5", "with_box_refine": "iterative box refinement"}
    names["look_forward_twice"] = "look forward twice"
    names["two_stage"] = "two-stage with mixed queries" if model.two_stage == "mixed" else "two-stage"
    parts = [model.backbone, *(name for key, name in names.items() if getattr(model, key))]
    steps = train.total_steps(images)
    return (
        f"**{'DETR' if model.arch == 'detr' else 'Deformable DETR'}** ({', '.join(parts)}, {model.num_queries} queries)"
        f" on {_verbatim(config.dataset.name)}: {images:,} images, {len(manifest.labels.names)} categories"
        f"{f', from {_verbatim(train.init.weights)}' if train.init.weights else ''}.\n\n"
        f"{steps:,} steps of {train.global_batch} images ({steps * train.global_batch / images:.3g} epochs), learning "
        f"rate {train.lr:g}, {train.precision}. The scores and the pictures are in `evaluate/report.html` among the "
        "artifacts, the settings in `config.yaml`."
    )


def _verbatim(text: str) -> str:
    return f"`{' '.join(text.replace('`', ' ').split())}`"


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
    run = config.folder
    nothing = UserError(f"{run}: no command has written anything for MLflow there; see name and runs")
    if run.store is None and not run.outbox.is_dir():
        raise nothing
    with driver_mirror(run, f"the run {config.name}", wait=wait):
        if not run.outbox.is_dir():
            raise nothing
        tracker = open_tracker(config)
        waiting = tracker.waiting()
        tracker.settle(patience=0)
    uploads = f"{waiting} upload{'' if waiting == 1 else 's'}" if waiting else "nothing waits"
    make_console().print(f"{outcome('track sync', uploads, is_new=waiting > 0)}\n{tracker.page}")
