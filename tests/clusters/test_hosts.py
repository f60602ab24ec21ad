"""Training on hosts that share a network and nothing else: runs, shards and data lie in S3, hosts are lost and come."""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pipeline.run_folder import RunFolder
from pipeline.store import StorePath
from tests.clusters.test_workers import command
from tests.end_to_end.test_pipeline import PROJECT
from tests.heads import RAY
from tests.hosts import CAN_HAVE_HOSTS, NEEDS, Host, hosts
from tests.pipeline.train.runs import losses
from tests.servers import MlflowServer
from tests.stores import S3Server

pytestmark = pytest.mark.skipif(not CAN_HAVE_HOSTS, reason=f"needs {NEEDS}")

WAIT_SECONDS = 300
PORT, DASHBOARD = 6379, 8265
SCHEDULE = {"train.epochs": 300, "evaluate.curve": "false"}
"""Steps enough that a fast machine is not done before the last fault."""


class Cluster:
    """A Ray cluster of hosts, each with one CPU, and a job on it.

    Args:
        environment: of the nodes and of the user.
        head: host of the head.
        folder: for logs.
        run: the run in the store.
    """

    def __init__(self, environment: dict[str, str], head: Host, folder: Path, run: StorePath) -> None:
        self._environment, self._head, self._folder, self._run = environment, head, folder, run
        self._stack = ExitStack()
        self.log = folder / "job.log"

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def start(self, host: Host) -> None:
        """Start Ray on a host; first on the head's."""
        if host is self._head:
            own = ["--head", f"--port={PORT}", "--dashboard-host=0.0.0.0", f"--dashboard-port={DASHBOARD}"]
        else:
            own = [f"--address={self._head.address}:{PORT}"]
        words = [RAY, "start", *own, "--num-cpus=1", f"--node-ip-address={host.address}", "--disable-usage-stats"]
        self._begin(host.command([*words, "--block"], PROJECT), f"{host.name}.log")

    def submit(self, words: list[str]) -> None:
        """Give a job to the cluster, from outside of it."""
        address = f"http://{self._head.address}:{DASHBOARD}"
        submit = [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", *words]
        for _ in range(60):  # a head takes some seconds until its job agent answers
            self._job = self._begin(submit, self.log.name)
            while self._job.poll() is None and "submitted" not in self.log.read_text():
                time.sleep(0.5)
            if "submitted" in self.log.read_text():
                return
        raise AssertionError(self.log.read_text())

    def _begin(self, words: list[str], log: str) -> "subprocess.Popen[bytes]":
        with (self._folder / log).open("w") as file:
            process = subprocess.Popen(words, cwd=PROJECT, env=self._environment, stdout=file, stderr=file)
        self._stack.callback(process.kill)
        return process

    def step(self) -> int:
        """The newest step that the store knows of."""
        try:
            lines = (self._run / "spool" / "train.jsonl").read_bytes().splitlines()
        except FileNotFoundError:
            return 0
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def told(self, text: str) -> int:
        """How often the job has told something."""
        return self.log.read_text().count(text)

    def lose(self, what: str, fault: Callable[[], object]) -> float:
        """The seconds from a fault until training does a step that it had not done."""
        began, restarts = time.monotonic(), self.told("; restart ")
        fault()
        self.wait_for(f"a restart after {what}", lambda: self.told("; restart ") > restarts)
        before = self.step()
        self.wait_for(f"a step after {what}", lambda: self.step() > before)
        return time.monotonic() - began

    def wait_for(self, what: str, seen: Callable[[], bool]) -> None:
        """Wait until something is seen."""
        began = time.monotonic()
        while not seen():
            assert self._job.poll() is None, self.log.read_text()[-5000:]
            assert time.monotonic() < began + WAIT_SECONDS, f"{what}: {self.log.read_text()[-5000:]}"
            time.sleep(0.2)

    def succeeds(self) -> None:
        assert self._job.wait(WAIT_SECONDS) == 0, self.log.read_text()[-5000:]


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The same run by one worker on a disk."""
    folder = tmp_path_factory.mktemp("steady")
    words = command(folder, "run", "steady", **SCHEDULE, **{"cluster.workers": 1})
    subprocess.run(words, cwd=PROJECT, check=True, capture_output=True, timeout=600)
    return RunFolder(folder / "runs" / "steady")


@contextmanager
def started(server: MlflowServer) -> Iterator[MlflowServer]:
    server.start()
    try:
        yield server
    finally:
        server.kill()


def test_hosts_are_killed_cut_off_and_added(
    s3: S3Server,
    s3_folder: StorePath,
    steady: RunFolder,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    dataset = steady.path.parents[1] / "shapes"
    for file in dataset.rglob("*"):
        if file.is_file():
            (s3_folder / "shapes" / file.relative_to(dataset).as_posix()).upload(file)
    run = RunFolder(tmp_path / "nowhere", s3_folder / "runs" / "shared")
    assert run.store is not None
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    plain["PATH"] = f"{Path(sys.executable).parent}:{plain['PATH']}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with hosts(3, tmp_path) as (here, (first, second, third)), ExitStack() as stack:
        server = stack.enter_context(started(MlflowServer(tmp_path / "mlflow", here)))
        environment = plain | token | s3.environment(host=here)
        cluster = stack.enter_context(Cluster(environment, first, tmp_path, run.store))
        cluster.start(first)
        extra = {
            **SCHEDULE,
            "runs": run.store.root + "/runs",
            "dataset.root": s3_folder / "shapes",
            "dataset.synthetic": "null",
            "dataset.train": "{annotations: annotations/instances_train2017.json, images: train2017}",
            "dataset.val": "{annotations: annotations/instances_val2017.json, images: val2017}",
            "tracking.uri": server.uri,
            "cluster.workers": "[1,2]",
        }
        words = command(tmp_path, "run", "shared", **extra)
        cluster.submit(["python", *words[1:]])
        cluster.start(second)
        cluster.wait_for("two workers", lambda: cluster.told("starting 2 workers") > 0)
        cluster.wait_for("steps", lambda: cluster.step() >= 30)

        after_kill = cluster.lose("a kill", second.kill)
        before = cluster.told("starting 2 workers")
        cluster.start(third)
        cluster.wait_for("two workers", lambda: cluster.told("starting 2 workers") > before)
        before = cluster.step()
        cluster.wait_for("steps", lambda: cluster.step() > before + 10)

        after_cut = cluster.lose("a cut", lambda: third.set_link("down"))
        cluster.succeeds()
        record_property("seconds to the next step", {"after a kill": after_kill, "after a cut": after_cut})
        print(f"to the next step: {after_kill:.0f} s after a kill, {after_cut:.0f} s after a cut")

    copy = RunFolder(tmp_path / "copy")
    copy.train_spool.parent.mkdir(parents=True)
    (run.store / "spool" / "train.jsonl").download(copy.train_spool)
    assert losses(copy) == pytest.approx(losses(steady), rel=1e-4)
    assert "registered   raydetr-demo version 1" in cluster.log.read_text()
    assert json.loads((run.store / "evaluate" / "metrics.json").read_bytes())["AP"] == pytest.approx(
        json.loads((steady.evaluation / "metrics.json").read_text())["AP"], abs=1e-3
    )
