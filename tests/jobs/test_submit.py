"""jobs/submit.py: ids, and what is refused before anything is sent; submitting itself is in clusters/test_submit.py."""

import pytest
from ray.job_submission import JobDetails, JobStatus

from jobs.options import Step, Submitted
from jobs.submit import jobs_of, refuse_what_stays_here, run_of, steps_options, sweep_options
from pipeline.config.load import load_config
from pipeline.errors import UserError

ABSOLUTE = ["runs=/shared/runs", "dataset.root=/shared/data"]


def job(identity: str, *, ours: bool = True) -> JobDetails:
    about = {"run": "any"} if ours else {}
    return JobDetails(
        type="SUBMISSION", submission_id=identity, status=JobStatus.SUCCEEDED, entrypoint="", metadata=about
    )


@pytest.mark.parametrize(
    ("identity", "run"),
    [("raydetr-cells-1", "cells"), ("raydetr-a-1-12", "a-1"), ("raysubmit_x", None), ("raydetr-cells", None)],
)
def test_the_run_of_a_job(identity: str, run: str | None) -> None:
    assert run_of(job(identity)) == run


def test_a_job_of_another_program_is_none_of_ours() -> None:
    assert run_of(job("raydetr-cells-1", ours=False)) is None


class Cluster:
    """A cluster that knows some jobs."""

    def __init__(self, *identities: str) -> None:
        self._jobs = [job(identity) for identity in identities]

    def all(self) -> list[JobDetails]:
        return self._jobs


def test_the_newest_of_a_run_is_last() -> None:
    cluster = Cluster("raydetr-a-10", "raydetr-a-9", "raydetr-a-1-3", "raysubmit_x")
    assert [each.submission_id for each in jobs_of(cluster, "a")] == ["raydetr-a-9", "raydetr-a-10"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["runs=/shared/runs"], r"^dataset\.root runs/data/shapes: a job runs"),
        (["dataset.root=/data"], r"^runs runs: .* --set runs=/shared/runs"),
        ([*ABSOLUTE, "shards.out=shards"], r"^shards\.out shards: "),
        ([*ABSOLUTE, "train.init.backbone=r50.pth"], r"^train\.init\.backbone r50\.pth: "),
        ([*ABSOLUTE, "train.init.weights=w.pth"], r"^train\.init\.weights w\.pth: "),
        ([*ABSOLUTE, "tracking.uri=sqlite:///mlflow.db"], r"^tracking\.uri mlflow\.db: "),
        ([*ABSOLUTE, "tracking.uri=http://me:secret@mlflow:5000"], r"^tracking\.uri: .*MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_what_means_nothing_on_a_cluster_is_refused(settings: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        refuse_what_stays_here(load_config("jobs/configs/demo.yaml", settings))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["shards.out=s3://bucket/shards", "dataset.root=s3://bucket/coco"],
        ["train.init.backbone=imagenet", "tracking.uri=http://mlflow:5000"],
        ["train.init.backbone=https://host/r50.pth", "tracking.uri=sqlite:////shared/mlflow.db"],
        ["train.init.weights=models:/cells@champion", "tracking.uri=http://mlflow:5000"],
    ],
    ids=["folders", "a store", "a server", "addresses", "a registered version"],
)
def test_what_all_hosts_see_is_taken(settings: list[str]) -> None:
    refuse_what_stays_here(load_config("jobs/configs/demo.yaml", [*ABSOLUTE, *settings]))


@pytest.mark.parametrize(
    ("first", "last", "options"),
    [
        (None, None, []),
        ("train", None, ["--from", "train"]),
        ("train", "train", ["--from", "train", "--until", "train"]),
    ],
)
def test_a_part_of_the_steps(first: Step | None, last: Step | None, options: list[str]) -> None:
    assert steps_options("run", first, last) == options


@pytest.mark.parametrize(
    ("command", "first", "last", "told"),
    [
        ("run", "evaluate", "train", r"^--from evaluate --until train: the steps are shard, train, evaluate, register"),
        ("train", None, "train", r"^--until train: a part of the steps of `run`, which `train` has not"),
        ("sweep", "train", None, r"^--from train: a part of the steps of `run`, which `sweep` has not"),
    ],
)
def test_no_part_of_the_steps(command: Submitted, first: Step | None, last: Step | None, told: str) -> None:
    with pytest.raises(UserError, match=told):
        steps_options(command, first, last)


def test_what_a_sweep_tries() -> None:
    over = ("train.lr=1e-5..1e-3", "model.num_queries=10,20")
    words = ["--over", over[0], "--over", over[1], "--search", "asha", "--trials", "20", "--at-once", "4"]
    assert sweep_options("sweep", over, "asha", 20, 4) == words
    assert sweep_options("sweep", over[:1], None, None, None) == words[:2]
    assert sweep_options("train", (), None, None, None) == []


def test_another_command_tries_nothing() -> None:
    told = r"^--over train\.lr=1,2 --search grid: for the trials of `sweep`, which `run` has not; remove it$"
    with pytest.raises(UserError, match=told):
        sweep_options("run", ("train.lr=1,2",), "grid", None, None)
