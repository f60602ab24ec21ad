"""The jobs that were submitted to a cluster: which there are, how one goes to its end, and how one is stopped."""

import json
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta

from ray.job_submission import JobDetails, JobStatus

from jobs.job_client import JobClient, LostError
from jobs.submit import STOP_SECONDS, jobs_of, run_of
from pipeline.errors import UserError
from pipeline.log import get_logger

logger = get_logger(__name__)

LOST_SECONDS = 600.0
"""Longest wait for a cluster that does not answer any more."""
RETRY_SECONDS = 2.0
"""Seconds between two looks."""
KILL_SECONDS = 20.0
"""Most that a job takes to be gone after the time that it has to stop."""
COLUMNS = ("run", "job", "command", "status", "user", "submitted", "took")


def find(client: JobClient, name: str) -> JobDetails:
    """The newest job of a run, or the one of this id.

    Raises:
        UserError: there is none.
    """
    found = [job for job in client.all() if job.submission_id == name and run_of(job)] or jobs_of(client, name)
    if not found:
        raise UserError(f"{client.address}: no job of a run {name} was submitted; `raydetr jobs list` shows them all")
    return found[-1]


def table(client: JobClient) -> list[tuple[str, ...]]:
    """A row of `COLUMNS` for each job that was submitted by `raydetr submit`, the newest last."""
    rows: list[tuple[str, ...]] = []
    for job in client.all():
        if (run := run_of(job)) is not None:
            about = job.metadata
            began = f"{_moment(job.start_time):%Y-%m-%d %H:%M:%S}"
            rows.append((run, job.submission_id, about["command"], job.status.value, about["user"], began, took(job)))
    return rows


def described(job: JobDetails) -> dict[str, str]:
    """What is known of a job, by name."""
    about = job.metadata
    known = {
        "run": about["run"],
        "job": job.submission_id,
        "command": " ".join([about["command"], *json.loads(about.get("options", "[]"))]),
        "status": job.status.value,
        "exit code": str(exit_code(job)) if job.status.is_terminal() else "",
        "user": about["user"],
        "submitted": f"{_moment(job.start_time):%Y-%m-%d %H:%M:%S}",
        "took": took(job),
        "code": about["code"],
        "config": f"sha256:{about['config_digest'][:12]}",
        "reason": reason(job),
    }
    return {name: value for name, value in known.items() if value}


def took(job: JobDetails) -> str:
    """How long a job has been there, until now or to its end."""
    end = _moment(job.end_time) if job.end_time else datetime.now()
    return str(timedelta(seconds=max(0, round((end - _moment(job.start_time)).total_seconds()))))


def _moment(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000)


def reason(job: JobDetails) -> str:
    """Why a job failed before its command began; what the command says is in its log."""
    if job.status != JobStatus.FAILED or job.driver_exit_code is not None:
        return ""
    return " ".join((job.message or "").split())[:500]


def exit_code(job: JobDetails) -> int:
    """The exit code of a job that has ended: its command's, 143 of a stopped one, 1 where the command never began."""
    if job.status == JobStatus.STOPPED:
        return 143
    if job.status == JobStatus.SUCCEEDED:
        return 0
    code: int = job.driver_exit_code if job.driver_exit_code is not None else 1
    return code if code > 0 else 128 - code


def to_the_end(client: JobClient, job: str, show: Callable[[str], None] | None = None) -> JobDetails:
    """Wait for a job to end, over lost connections.

    Args:
        client: of the cluster.
        job: its id.
        show: gets the log as it comes, each part once.

    Returns:
        The job, which has ended.

    Raises:
        LostError: the cluster has not answered for `LOST_SECONDS`.
        UserError: the cluster does not know the job any more.
    """
    shown, lost = 0, None
    while True:
        try:
            if show is not None:
                position = 0
                for text in client.tail(job):
                    new = text[max(0, shown - position) :]
                    position += len(text)
                    if new:
                        show(new)
                        shown = position
            details = client.info(job)
        except LostError as error:
            if lost is None:
                logger.warning("%s; the job may go on, trying again for %.3g minutes", error, LOST_SECONDS / 60)
                lost = time.monotonic()
            elif time.monotonic() - lost > LOST_SECONDS:
                raise
        else:
            if lost is not None:
                logger.warning("%s answers again", client.address)
                lost = None
            if details.status.is_terminal():
                return details
        time.sleep(RETRY_SECONDS)


def stop(client: JobClient, job: JobDetails) -> JobDetails:
    """Ask a job to end, and wait until it has.

    Raises:
        UserError: it has not ended when it had to be gone.
    """
    client.stop(job.submission_id)
    end = time.monotonic() + STOP_SECONDS + KILL_SECONDS
    while not (job := client.info(job.submission_id)).status.is_terminal():
        if time.monotonic() > end:
            raise UserError(f"{job.submission_id}: does not end; the head's log of it says more: {client.address}")
        time.sleep(0.2)
    return job


def last_line(log: str) -> str:
    """The last line of a log that says something."""
    lines = [line for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def print_at_once(text: str) -> None:
    """Show a part of a log."""
    sys.stdout.write(text)
    sys.stdout.flush()
