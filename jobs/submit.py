"""Submits a command of the pipeline to a cluster as a Ray job, under an id that follows from the run's name.

A run has one job at a time: its n-th is `raydetr-<name>-<n>`. Of two that are submitted at the same moment, and so
under the same id, the cluster takes one. A sweep's job is one of the run <name>-sweep, in whose folder it works.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray.job_submission import JobDetails

from jobs.interpreter import HOOK, entry_point
from jobs.job_client import JobClient, TakenError
from jobs.options import STEPS, Search, Step, Submitted, steps_between
from jobs.package import Package, pack
from jobs.trials import sweep_name
from pipeline.config.address import SQLITE, without_secrets
from pipeline.config.load import dump_config, parse_config
from pipeline.config.sections import Config
from pipeline.config.values import digest
from pipeline.errors import UserError
from pipeline.tracking.provenance import user

STOP_SECONDS = 10
"""Seconds that a stopped job has for its checkpoint; Ray would give it 3."""
_ID = re.compile(r"raydetr-(?P<run>.+)-(?P<attempt>\d+)")


def run_of(job: JobDetails) -> str | None:
    """The name of the run that a job works on; None for a job that was not submitted here."""
    found = _ID.fullmatch(job.submission_id)
    return found["run"] if found and "run" in (job.metadata or {}) else None


def jobs_of(client: JobClient, run: str) -> list[JobDetails]:
    """The jobs of a run, the newest last."""
    return sorted((job for job in client.all() if run_of(job) == run), key=_attempt)


def _attempt(job: JobDetails) -> int:
    found = _ID.fullmatch(job.submission_id)
    assert found is not None
    return int(found["attempt"])


def submit(client: JobClient, command: Submitted, config: Config, options: Sequence[str] = ()) -> tuple[str, Package]:
    """Begin a job of the run, unless one is waiting or running.

    Args:
        client: of the cluster.
        command: which of the pipeline's commands.
        options: words that follow the command.
        config: the pipeline; its `cluster.address` is left out, as the job is on its cluster.

    Returns:
        The job's id, and what was sent.

    Raises:
        UserError: the run has a job already, or a setting means nothing on a cluster.
    """
    refuse_what_stays_here(config)
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": None})})
    run = sweep_name(config) if command == "sweep" else config.name
    before = jobs_of(client, run)
    if before and not before[-1].status.is_terminal():
        raise UserError(_has_one(before[-1]))
    job = f"raydetr-{run}-{_attempt(before[-1]) + 1 if before else 1}"
    package = pack(config)
    variables = {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: HOOK, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "package.zip")
        path.write_bytes(package.archive)
        line = entry_point("-m", "jobs", command, "-c", package.config_name, *options)
        about = _about(run, command, config, package) | {"options": json.dumps(options)}
        try:
            client.submit(line, job, str(path), variables, about)
        except TakenError:
            raise UserError(_has_one(client.info(job))) from None
    return job, package


def submit_again(client: JobClient, last: JobDetails) -> tuple[str, Package]:
    """Begin another job with the command and the configuration of an earlier one, and the packages as they are here."""
    about = last.metadata
    config = parse_config(json.loads(about["config"]), last.submission_id)
    return submit(client, about["command"], config, json.loads(about.get("options", "[]")))


def steps_options(command: Submitted, first: Step | None, last: Step | None) -> list[str]:
    """The words for a part of the steps of `run`.

    Raises:
        UserError: another command has no such part, or the last step comes before the first.
    """
    options = _words({"--from": first, "--until": last})
    if options and command != "run":
        raise UserError(f"{' '.join(options)}: a part of the steps of `run`, which `{command}` has not; remove it")
    steps_between(first or STEPS[0], last or STEPS[-1])
    return options


def sweep_options(
    command: Submitted, over: Sequence[str], search: Search | None, trials: int | None, at_once: int | None
) -> list[str]:
    """The words for what a sweep tries; whether they are right is `plan_sweep`'s.

    Raises:
        UserError: another command tries nothing.
    """
    options = [word for each in over for word in ("--over", each)]
    options += _words({"--search": search, "--trials": trials, "--at-once": at_once})
    if options and command != "sweep":
        raise UserError(f"{' '.join(options)}: for the trials of `sweep`, which `{command}` has not; remove it")
    return options


def _words(given: Mapping[str, object]) -> list[str]:
    """Options with their values, but for those that are None."""
    return [word for option, value in given.items() if value is not None for word in (option, str(value))]


def _about(run: str, command: str, config: Config, package: Package) -> dict[str, str]:
    """What the cluster keeps beside a job."""
    settings = dump_config(config)
    return {
        "run": run,
        "command": command,
        "user": user(),
        "code": package.code,
        "config_digest": digest(settings),
        "config": json.dumps(settings),
    }


def _has_one(job: JobDetails) -> str:
    run, user = run_of(job), job.metadata["user"]
    return (
        f"the run {run} has a job that is {job.status.lower()}: {job.submission_id}, submitted by {user}; follow it "
        f"with `raydetr jobs logs {run} --follow`, stop it with `raydetr jobs stop {run}`, or choose another name"
    )


def refuse_what_stays_here(config: Config) -> None:
    """Raise a UserError where a setting means something on this machine alone, or must not be seen on the cluster."""
    relative = [
        f"{key} {value}" for key, value in _paths(config) if "://" not in value and not Path(value).is_absolute()
    ]
    if relative:
        raise UserError(
            f"{', '.join(relative)}: a job runs in a folder of its cluster's head that does not last; give a path that "
            "begins with / and that all hosts see, for example --set runs=/shared/runs"
        )
    uri = config.tracking.uri or ""
    if without_secrets(uri) != uri:
        raise UserError(
            "tracking.uri: holds a password or a query, and the cluster's page would show it; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment of the cluster's head instead"
        )


def _paths(config: Config) -> Iterator[tuple[str, str]]:
    """The settings that name a file or a folder."""
    yield "runs", config.runs
    yield "dataset.root", config.dataset.root
    init, uri = config.train.init, config.tracking.uri or ""
    for key, value in (("shards.out", config.shards.out), ("shards.cache", config.shards.cache)):
        if value is not None:
            yield key, value
    if init.backbone not in (None, "imagenet"):
        yield "train.init.backbone", init.backbone
    if init.weights is not None and not init.is_registered:
        yield "train.init.weights", init.weights
    if uri.startswith(SQLITE):
        yield "tracking.uri", uri.removeprefix(SQLITE)
    elif uri and "://" not in uri:
        yield "tracking.uri", uri
