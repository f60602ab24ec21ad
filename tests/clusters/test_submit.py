"""`raydetr submit` and `raydetr jobs` as a user gives them, against a head that was started from a plain shell."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.end_to_end.test_pipeline import PROJECT, SMALL
from tests.heads import RayHead, ray_head
from tests.proxies import proxy_of

WAIT_SECONDS = 240


class User:
    """Whoever gives commands on another machine than the cluster's: elsewhere, with a configuration that lies there."""

    def __init__(self, head: RayHead, folder: Path) -> None:
        self.folder = folder
        packages = {"PYTHONPATH": str(PROJECT), "TMPDIR": os.environ.get("TMPDIR", "/tmp")}
        self.environment = {**head.environment, **packages, "RAY_API_SERVER_ADDRESS": head.address}
        while self.raydetr("jobs", "list").returncode:
            time.sleep(1)

    def write(self, name: str, **settings: object) -> Path:
        """A configuration of a small run."""
        config = yaml.safe_load((PROJECT / "jobs" / "configs" / "demo.yaml").read_text())
        whole = {
            **SMALL,
            "name": name,
            "runs": self.folder / "runs",
            "dataset.root": self.folder / "shapes",
            **settings,
        }
        for key, value in whole.items():
            *sections, last = key.split(".")
            section = config
            for each in sections:
                section = section.setdefault(each, {})
            section[last] = yaml.safe_load(str(value))
        path = self.folder / f"of {name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def start(self, *arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
        command, environment = [sys.executable, "-m", "jobs", *arguments], {**self.environment, **variables}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=environment, **pipes)

    def raydetr(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **variables)
        out, error = process.communicate(timeout=WAIT_SECONDS)
        return subprocess.CompletedProcess(process.args, process.returncode, out, error)

    def status(self, name: str) -> dict[str, str]:
        lines = self.raydetr("jobs", "status", name).stdout.splitlines()
        return {line[:10].strip(): line[11:] for line in lines}

    def wait_for_points(self, name: str, count: int) -> None:
        """Wait until so many steps of a run were logged."""
        path, end = self.folder / "runs" / name / "spool" / "train.jsonl", time.monotonic() + WAIT_SECONDS
        while not path.exists() or len(path.read_text().splitlines()) < count:
            assert time.monotonic() < end
            time.sleep(0.1)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    with ray_head(tmp_path_factory.mktemp("head"), path="/usr/bin:/bin") as head:
        yield head


@pytest.fixture(scope="module")
def user(head: RayHead, tmp_path_factory: pytest.TempPathFactory) -> User:
    return User(head, tmp_path_factory.mktemp("user"))


def test_a_job_goes_to_its_end_and_is_continued_by_the_same_command(user: User) -> None:
    config = user.write("whole")
    began = time.time()
    first = user.raydetr("submit", "run", "-c", config, "--set", "train.max_steps=4", "--follow")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "and whole.yaml" in first.stdout
    assert "registered   raydetr-demo version 1 @champion" in first.stdout
    assert first.stderr.splitlines()[-1] == "raydetr-whole-1: SUCCEEDED"
    _print_parts(began, first.stdout, user.folder / "runs" / "whole")
    known = user.status("whole")
    assert (known["status"], known["exit code"], known["command"]) == ("SUCCEEDED", "0", "run")
    assert "sha256:" in known["code"]
    again = user.raydetr("submit", "evaluate", "-c", config, "--set", "train.max_steps=4", "--wait")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "AP" not in again.stdout
    assert "already done" in user.raydetr("jobs", "logs", "whole").stdout
    listed = user.raydetr("jobs", "list").stdout.splitlines()
    assert [line.split()[:4] for line in listed[-2:]] == [
        ["whole", "raydetr-whole-1", "run", "SUCCEEDED"],
        ["whole", "raydetr-whole-2", "evaluate", "SUCCEEDED"],
    ]


def _print_parts(began: float, log: str, run: Path) -> None:
    """Where the seconds until the first step went; shown with `pytest -s`."""
    day = time.strftime("%Y-%m-%d ")
    lines = log.splitlines()

    def at(words: str, place: int = 0) -> float:
        line = next(line for line in lines if words in line)
        text = line[:8] if place == 0 else line[11:19]
        return time.mktime(time.strptime(day + text, "%Y-%m-%d %H:%M:%S"))

    first_point = json.loads((run / "spool" / "train.jsonl").read_text().splitlines()[0])["time"]
    moments = {
        "accepted": at("Runtime env is setting up", 1),
        "driver works": at("synthetic dataset"),
        "sharded": at("shard: val"),
        "workers asked for": at("train: starting"),
        "first step": first_point,
    }
    print({name: round(moment - began, 1) for name, moment in moments.items()})


def test_of_two_at_the_same_moment_one_is_taken_and_it_can_be_stopped_and_resumed(user: User) -> None:
    words = (
        "submit",
        "run",
        "-c",
        user.write("long", **{"train.epochs": 12, "train.checkpoint_epochs": 12, "evaluate.curve": False}),
    )
    both = [user.start(*words) for _ in range(2)]
    told = [process.communicate(timeout=WAIT_SECONDS) for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], told
    (refused,) = (error for _, error in told if error)
    assert refused.startswith("error: the run long has a job that is ")
    assert "raydetr jobs stop long" in refused
    assert refused.count("\n") == 1

    follower = user.start("jobs", "logs", "long", "--follow")
    user.wait_for_points("long", 5)
    follower.send_signal(signal.SIGINT)
    log, line = follower.communicate(timeout=10)
    assert "train: starting" in log
    assert follower.returncode == 130
    assert line.startswith("interrupted (SIGINT); the job goes on.")
    assert "raydetr jobs stop raydetr-long-1" in line
    assert user.status("long")["status"] == "RUNNING"
    busy = user.raydetr(*words)
    assert busy.returncode == 2
    assert "is running: raydetr-long-1" in busy.stderr

    checkpoints = user.folder / "runs" / "long" / "checkpoints"
    assert not list(checkpoints.glob("*"))
    began = time.monotonic()
    stopped = user.raydetr("jobs", "stop", "long")
    assert time.monotonic() - began < 20
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.startswith("raydetr-long-1: STOPPED\ninterrupted (SIGTERM); training goes on from ")
    (new,) = checkpoints.iterdir()
    assert str(new) in stopped.stdout

    resumed = user.raydetr("jobs", "resume", "long", "--follow")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"going on from {new}" in resumed.stdout
    assert resumed.stderr.splitlines()[-1] == "raydetr-long-2: SUCCEEDED"
    assert "has ended before: SUCCEEDED" in user.raydetr("jobs", "stop", "long").stdout


def test_a_part_of_the_steps_is_resumed_as_it_was_submitted(user: User) -> None:
    config = user.write("part")
    submitted = user.raydetr("submit", "run", "-c", config, "--until", "shard", "--follow")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert user.status("part")["command"] == "run --until shard"
    resumed = user.raydetr("jobs", "resume", "part", "--follow")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "shard: already done" in resumed.stdout
    for log in (submitted.stdout, resumed.stdout):
        assert "train:" not in log


def test_a_sweep_has_one_job_and_is_resumed_with_the_same_trials(user: User) -> None:
    config = user.write("tried", **{"cluster.workers": 1, "train.epochs": 80, "train.checkpoint_epochs": 40})
    over = "--over train.lr=1e-3,1e-5 --at-once 1"
    submitted = user.raydetr("submit", "sweep", "-c", config, *over.split())
    assert submitted.returncode == 0, submitted.stderr
    assert submitted.stdout.startswith("submitted raydetr-tried-sweep-1 to ")
    user.wait_for_points("tried-sweep-2", 5)
    assert user.status("tried-sweep")["command"] == f"sweep {over}"
    busy = user.raydetr("submit", "sweep", "-c", config, "--over", "train.lr=1e-4")
    assert busy.returncode == 2
    assert "the run tried-sweep has a job that is running: raydetr-tried-sweep-1" in busy.stderr
    stopped = user.raydetr("jobs", "stop", "tried-sweep")
    assert stopped.stdout.startswith("raydetr-tried-sweep-1: STOPPED\ninterrupted (SIGTERM)"), stopped.stdout
    (cut,) = (user.folder / "runs" / "tried-sweep-2" / "checkpoints").glob("checkpoint-*")

    resumed = user.raydetr("jobs", "resume", "tried-sweep", "--follow")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "sweep: already done, 1 of 2 trials" in resumed.stdout
    assert "models:/raydetr-demo/" in resumed.stdout
    log = user.folder / "runs" / "tried-sweep" / "trials" / "2.log"
    assert f"going on from {cut}" in log.read_text()
    assert user.status("tried-sweep")["command"] == f"sweep {over}"
    other = user.raydetr("submit", "sweep", "-c", config, "--over", "train.lr=1e-4", "--follow")
    assert other.returncode == 2
    assert "over.train.lr: 1e-3,1e-5 -> 1e-4" in other.stdout


def test_the_exit_code_is_the_jobs(user: User) -> None:
    config = user.write("wrong", **{"dataset.root": "/nowhere", "dataset.synthetic": "null"})
    failed = user.raydetr("submit", "shard", "-c", config, "--follow")
    assert failed.returncode == 2
    assert "/nowhere" in failed.stdout
    assert failed.stderr == "raydetr-wrong-1: FAILED\n"
    assert user.status("wrong")["exit code"] == "2"


def test_behind_a_proxy_the_log_is_whole_after_a_lost_connection(user: User, tmp_path: Path) -> None:
    with proxy_of(user.environment["RAY_API_SERVER_ADDRESS"], tmp_path) as proxy:
        there = ("--address", proxy.address)
        unknown = user.raydetr("jobs", "list", *there)
        assert unknown.returncode == 2
        assert "its certificate is not trusted" in unknown.stderr
        trust = {"REQUESTS_CA_BUNDLE": str(proxy.certificate)}
        config = user.write("behind", **{"train.epochs": 4, "evaluate.curve": False})
        follower = user.start("submit", "run", "-c", config, *there, "--follow", **trust)
        user.wait_for_points("behind", 2)
        proxy.cut()
        time.sleep(3)
        away = user.raydetr("jobs", "list", *there, **trust)
        assert away.returncode == 2
        assert "no Ray answers" in away.stderr
        assert away.stderr.count("\n") == 1
        proxy.mend()
        log, told = follower.communicate(timeout=WAIT_SECONDS)
        assert follower.returncode == 0, log + told
        assert "the job may go on, trying again" in told
        assert f"{proxy.address.rstrip('/')} answers again" in told
        assert user.raydetr("jobs", "logs", "behind", *there, **trust).stdout.rstrip() in log


def test_without_a_cluster_or_its_token(user: User) -> None:
    no_head = user.raydetr("jobs", "list", "--address", "http://127.0.0.1:1")
    assert no_head.returncode == 2
    assert no_head.stderr.startswith("error: http://127.0.0.1:1: no Ray answers ([Errno 111] Connection refused)")
    wrong = user.raydetr("jobs", "list", RAY_AUTH_TOKEN="f" * 64)
    assert wrong.returncode == 2
    assert "the cluster wants a token, and not the one given here" in wrong.stderr
    unknown = user.raydetr("jobs", "logs", "nobody")
    assert unknown.returncode == 2
    assert "no job of a run nobody" in unknown.stderr
    for result in (no_head, wrong, unknown):
        assert result.stderr.count("\n") == 1


def test_the_token_may_be_in_a_file(user: User, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(user.environment["RAY_AUTH_TOKEN"])
    (tmp_path / "token").chmod(0o600)
    variables = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"), "RAY_AUTH_TOKEN": ""}
    assert user.raydetr("jobs", "list", **variables).returncode == 0
