"""jobs/jobs.py: what is said of a job, and how one is followed over lost connections."""

from collections.abc import Iterator

import pytest
from ray.job_submission import JobDetails, JobStatus

from jobs import jobs
from jobs.job_client import LostError
from jobs.jobs import described, exit_code, find, last_line, table, to_the_end
from pipeline.errors import UserError

ABOUT = {"run": "cells", "command": "run", "user": "anna", "code": "0.1.0 sha256:ab", "config_digest": "c" * 64}


def job(status: JobStatus, code: int | None = None, message: str = "", number: int = 1) -> JobDetails:
    return JobDetails(
        type="SUBMISSION", submission_id=f"raydetr-cells-{number}", status=status, entrypoint="", metadata=ABOUT,
        start_time=1_000_000, end_time=1_061_000, driver_exit_code=code, message=message,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        (job(JobStatus.SUCCEEDED, 0), 0),
        (job(JobStatus.FAILED, 3), 3),
        (job(JobStatus.FAILED, -9), 137),
        (job(JobStatus.FAILED), 1),
        (job(JobStatus.STOPPED), 143),
    ],
    ids=["done", "its code", "killed", "never began", "stopped"],
)
def test_exit_codes(ended: JobDetails, code: int) -> None:
    assert exit_code(ended) == code


def test_what_is_known_of_a_job() -> None:
    known = described(job(JobStatus.FAILED, message="no space\nleft"))
    assert known["reason"] == "no space left"
    assert (known["took"], known["exit code"], known["user"]) == ("0:01:01", "1", "anna")
    assert "reason" not in described(job(JobStatus.FAILED, 2, "the log's end"))
    assert "exit code" not in described(job(JobStatus.RUNNING))


class Cluster:
    """A cluster whose connection is cut after some characters of a log, each time it is read."""

    address = "http://head:8265"

    def __init__(self, *known: JobDetails, log: str = "", cuts: tuple[int, ...] = ()) -> None:
        self.known, self.log_text, self.cuts = known, log, list(cuts)

    def all(self) -> list[JobDetails]:
        return list(self.known)

    def info(self, name: str) -> JobDetails:
        return self.known[-1]

    def tail(self, name: str) -> Iterator[str]:
        end = self.cuts.pop(0) if self.cuts else None
        for start in range(0, len(self.log_text[:end]), 4):
            yield self.log_text[:end][start : start + 4]
        if end is not None:
            raise LostError("http://head:8265: the connection to the cluster is lost")


def test_the_table_has_the_newest_last() -> None:
    rows = table(Cluster(job(JobStatus.FAILED, 1), job(JobStatus.RUNNING, number=2)))
    assert {len(row) for row in rows} == {len(jobs.COLUMNS)}
    assert [row[1] for row in rows] == ["raydetr-cells-1", "raydetr-cells-2"]


def test_a_job_is_found_by_its_run_or_its_id() -> None:
    cluster = Cluster(job(JobStatus.FAILED, 1), job(JobStatus.RUNNING, number=2))
    assert find(cluster, "cells").submission_id == "raydetr-cells-2"
    assert find(cluster, "raydetr-cells-1").submission_id == "raydetr-cells-1"
    with pytest.raises(UserError, match="no job of a run nuclei was submitted"):
        find(cluster, "nuclei")


def test_each_part_of_a_log_is_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "RETRY_SECONDS", 0)
    cluster = Cluster(job(JobStatus.SUCCEEDED, 0), log="one\ntwo\nthree\n", cuts=(0, 6, 5, 9))
    parts: list[str] = []
    assert to_the_end(cluster, "raydetr-cells-1", parts.append).status == JobStatus.SUCCEEDED
    assert "".join(parts) == "one\ntwo\nthree\n"


def test_a_cluster_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "RETRY_SECONDS", 0)
    monkeypatch.setattr(jobs, "LOST_SECONDS", 0)
    with pytest.raises(LostError):
        to_the_end(Cluster(job(JobStatus.RUNNING), cuts=(0,) * 100), "raydetr-cells-1", lambda text: None)


def test_the_last_line() -> None:
    assert last_line("one\ntwo\n\n") == "two"
    assert last_line("") == ""
