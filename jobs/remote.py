"""The commands for jobs on a cluster: `raydetr submit` and `raydetr jobs ...`."""

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.interrupt import Interrupted
from jobs.options import AtOnce, ConfigFile, HowToSearch, Over, Overrides, Step, Submitted, Trials

if TYPE_CHECKING:
    from jobs.job_client import JobClient

Address = Annotated[
    str | None,
    typer.Option(
        help="Address of the cluster's Ray dashboard. The default is RAY_API_SERVER_ADDRESS, then http://127.0.0.1:8265.",
        show_default=False,
    ),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the run, for its newest job, or the id of a job.")]
Follow = Annotated[
    bool, typer.Option("--follow", help="Show the log to the end of the job, and end with the job's exit code.")
]

jobs_app = typer.Typer(help="The jobs on a cluster.", no_args_is_help=True, rich_markup_mode="rich")


def submit(
    command: Annotated[
        Submitted,
        typer.Argument(metavar="run|shard|train|evaluate|sweep", help="What the job does.", show_default=False),
    ],
    config: ConfigFile,
    overrides: Overrides = None,
    first: Annotated[Step | None, typer.Option("--from", help="The first step of run.", show_default="shard")] = None,
    last: Annotated[Step | None, typer.Option("--until", help="The last step of run.", show_default="register")] = None,
    over: Over = None,
    search: HowToSearch = None,
    trials: Trials = None,
    at_once: AtOnce = None,
    address: Address = None,
    follow: Follow = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end without the log.")] = False,
) -> None:
    """Begin a job on a cluster, from these sources and this configuration; the same again goes on with an ended one.

    --over, --search, --trials and --at-once are those of sweep. Its job is one of the run NAME-sweep.
    """
    from jobs.trials import plan_sweep
    from pipeline.config.load import load_config

    settings = load_config(config, overrides or ())
    from jobs.submit import refuse_what_stays_here, steps_options, sweep_options
    from jobs.submit import submit as submit_job

    options = steps_options(command, first, last) + sweep_options(command, over or (), search, trials, at_once)
    refuse_what_stays_here(settings)
    if command == "sweep":
        for trial in plan_sweep(config, overrides or (), over or (), search or "grid", trials).trials:
            refuse_what_stays_here(trial.config)
    client = _client(address)
    job, package = submit_job(client, command, settings, options)
    _begun(client, job, str(package), address, follow=follow, wait=wait)


@jobs_app.command("list", epilog="Example: raydetr jobs list --address http://head:8265")
def list_(address: Address = None) -> None:
    """All jobs that were submitted, the newest last."""
    from jobs.console import print_table
    from jobs.jobs import COLUMNS, table

    print_table(COLUMNS, table(_client(address)))


@jobs_app.command(epilog="Example: raydetr jobs status cells")
def status(name: Name, address: Address = None) -> None:
    """What is known of a job."""
    from jobs.jobs import described, find

    for what, value in described(find(_client(address), name)).items():
        typer.echo(f"{what:<10} {value}")


@jobs_app.command(epilog="Example: raydetr jobs logs cells --follow")
def logs(name: Name, address: Address = None, follow: Follow = False) -> None:
    """The log of a job."""
    from jobs.jobs import find

    client = _client(address)
    job = find(client, name)
    if follow:
        _to_the_end(client, job.submission_id, address, show_log=True)
    typer.echo(client.log(job.submission_id), nl=False)


@jobs_app.command(epilog="Example: raydetr jobs stop cells")
def stop(name: Name, address: Address = None) -> None:
    """End a job in order, with a checkpoint; `raydetr jobs resume` goes on from it."""
    from jobs.jobs import find, last_line
    from jobs.jobs import stop as stop_job

    client = _client(address)
    job = find(client, name)
    if job.status.is_terminal():
        typer.echo(f"{job.submission_id} has ended before: {job.status.value}")
        return
    job = stop_job(client, job)
    typer.echo(f"{job.submission_id}: {job.status.value}\n{last_line(client.log(job.submission_id))}")


@jobs_app.command(epilog="Example: raydetr jobs resume cells --follow")
def resume(
    name: Name,
    address: Address = None,
    follow: Follow = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end without the log.")] = False,
) -> None:
    """Submit the command and the configuration of a run's newest job once more; it goes on where that one stood."""
    from jobs.jobs import find
    from jobs.submit import submit_again

    client = _client(address)
    last = find(client, name)
    job, package = submit_again(client, last)
    if package.code != last.metadata["code"]:
        typer.echo(f"the code is another than of {last.submission_id}: {last.metadata['code']} -> {package.code}")
    _begun(client, job, str(package), address, follow=follow, wait=wait)


def _client(address: str | None) -> "JobClient":
    from jobs.job_client import JobClient, address_of

    return JobClient(address_of(address, os.environ))


def _begun(client: "JobClient", job: str, sent: str, address: str | None, *, follow: bool, wait: bool) -> None:
    """Say what was begun, and go with it to its end where that is wanted."""
    typer.echo(f"submitted {job} to {client.address} with {sent}")
    if follow or wait:
        _to_the_end(client, job, address, show_log=follow)
    typer.echo(_how_to_go_on(job, address))


def _to_the_end(client: "JobClient", job: str, address: str | None, *, show_log: bool) -> None:
    """Wait for the end of a job and end with its exit code; an interrupt ends the waiting, not the job."""
    from jobs.jobs import exit_code, print_at_once, reason, to_the_end

    try:
        ended = to_the_end(client, job, print_at_once if show_log else None)
    except Interrupted as interrupted:
        sys.stderr.write(f"interrupted ({interrupted}); the job goes on. {_how_to_go_on(job, address)}\n")
        raise typer.Exit(interrupted.exit_code) from None
    sys.stderr.write(f"{job}: {ended.status.value}. {reason(ended)}".rstrip(" .") + "\n")
    raise typer.Exit(exit_code(ended))


def _how_to_go_on(job: str, address: str | None) -> str:
    there = f" --address {address}" if address else ""
    return f"Its log: `raydetr jobs logs {job} --follow{there}`; to end it: `raydetr jobs stop {job}{there}`"
