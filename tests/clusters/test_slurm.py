"""infra/slurm on a real Slurm of two nodes, both on this machine: notice, requeue, continuation, cancelling."""

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.test_pipeline import PROJECT, SMALL
from tests.heads import free_port

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)}: not here (Debian: slurm-wlm, munge)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons run as root"),
]

WAIT_SECONDS = 300
STEPS = 60
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/control.log
SlurmdLogFile={folder}/%n.log
SlurmctldPidFile={folder}/control.pid
SlurmdPidFile={folder}/%n.pid
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=1 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=1 RealMemory=4000
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Slurm:
    """Two nodes on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ports = [free_port() for _ in range(3)]
        values = dict(zip(("control", "first", "second"), ports, strict=True))
        text = CONFIG.format(host=socket.gethostname().partition(".")[0], folder=folder, **values)
        (folder / "slurm.conf").write_text(text)
        (folder / "state").mkdir()
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(PROJECT)}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        options = {"socket": "munge.socket", "key-file": "munge.key", "log-file": "munge.log", "pid-file": "munge.pid"}
        options["seed-file"] = "munge.seed"
        self._begin("munged", "--foreground", "--force", *(f"--{k}={self.folder / v}" for k, v in options.items()))
        while not (self.folder / "munge.socket").exists():
            time.sleep(0.1)
        self._begin("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._begin("slurmd", "-D", "-N", node)
        end = time.monotonic() + 60
        while self.ask("sinfo", "--noheader", "--states=idle", "--Format=nodes").strip() != "2":
            assert time.monotonic() < end, self.ask("sinfo")
            time.sleep(0.5)

    def _begin(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as out:
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=out, stderr=out))

    def stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()

    def ask(self, *command: str) -> str:
        """What a command of Slurm's prints, whatever comes of it."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False).stdout

    def submit(self, folder: Path) -> str:
        """Submit the project's script with a small run; returns the job's number."""
        environment = {
            **self.environment,
            "RAYDETR": str(folder / "raydetr"),
            "RAYDETR_RAY_LOG": str(folder / "ray.log"),
        }
        # The sources under test, by the interpreter that runs the test.
        for name, program in (
            ("raydetr", f"{sys.executable} -m jobs"),
            ("ray", str(Path(sys.executable).with_name("ray"))),
        ):
            (folder / name).write_text(f'#!/bin/sh\nexec {program} "$@"\n')
            (folder / name).chmod(0o755)
        options = ["--parsable", "--nodes=2", f"--output={folder}/log", "--time=60", "--signal=B:USR1@58"]
        command = ["sbatch", *options, "infra/slurm/raydetr.sbatch", *words(folder)]
        return subprocess.run(
            command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    def show(self, job: str, key: str) -> str:
        """A value of what Slurm knows of a job."""
        found = re.search(rf"\b{key}=(\S*)", self.ask("scontrol", "show", "job", job))
        return found[1] if found else ""


def words(folder: Path) -> list[str]:
    """What `raydetr run` is given: two workers, each of which needs a node of its own."""
    settings = {**SMALL, "runs": folder / "runs", "dataset.root": folder.parent / "shapes"}
    settings |= {"cluster.workers": 2, "cluster.cpus_per_worker": 1, "train.epochs": STEPS // 3}
    settings |= {"train.checkpoint_epochs": STEPS // 3, "evaluate.curve": False}
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["-c", str(PROJECT / "jobs" / "configs" / "demo.yaml"), *arguments]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    made = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


def wait_for(what: str, folder: Path, slurm: Slurm, is_there: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not is_there():
        assert time.monotonic() < end, f"{what}\n{(folder / 'log').read_text()}\n{slurm.ask('squeue')}"
        time.sleep(0.5)


def points(folder: Path) -> int:
    path = folder / "runs" / "demo" / "spool" / "train.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def weights(folder: Path) -> str:
    return hashlib.sha256(
        (folder / "runs" / "demo" / "checkpoints" / f"checkpoint-{STEPS}" / "model.safetensors").read_bytes()
    ).hexdigest()


def test_a_run_whose_time_is_over_goes_on_to_the_same_weights(slurm: Slurm, tmp_path: Path) -> None:
    folder, unbroken = tmp_path / "slurm", tmp_path / "unbroken"
    folder.mkdir()
    job = slurm.submit(folder)
    wait_for("training", folder, slurm, lambda: points(folder) >= 4)
    assert slurm.show(job, "NumNodes") == "2"
    # Notice is given 58 seconds before the end of the time, which is now 1 to 2 minutes away.
    minutes = 2 + (lambda h, m, s: 60 * h + m)(*map(int, slurm.show(job, "RunTime").split(":")))
    slurm.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    wait_for("being queued again", folder, slurm, lambda: slurm.show(job, "Restarts") == "1")
    slurm.ask("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    wait_for("the end", folder, slurm, lambda: slurm.show(job, "JobState") == "COMPLETED")
    log = (folder / "log").read_text()
    kept = re.search(r"interrupted \(SIGTERM\); training goes on from (\S+)\.", log)
    assert kept, log
    assert int(kept[1].rpartition("-")[2]) % STEPS, "the checkpoint is of the middle of the schedule"
    assert f"going on from {kept[1]}" in log
    assert log.count("registered   raydetr-demo version 1 @champion") == 1

    command = [sys.executable, "-m", "jobs", "run", *words(unbroken)]
    subprocess.run(command, cwd=PROJECT, capture_output=True, timeout=WAIT_SECONDS, check=True)
    assert weights(folder) == weights(unbroken)


def test_a_job_is_ended_in_order_or_at_once_and_not_queued_again(slurm: Slurm, tmp_path: Path) -> None:
    folder = tmp_path / "slurm"
    folder.mkdir()
    job = slurm.submit(folder)
    wait_for("training", folder, slurm, lambda: points(folder) >= 2)
    slurm.ask("scancel", "--batch", "--signal=TERM", job)
    wait_for("the end", folder, slurm, lambda: slurm.show(job, "JobState") == "FAILED")
    assert (slurm.show(job, "ExitCode"), slurm.show(job, "Restarts")) == ("143:0", "0")
    kept = re.search(r"interrupted \(SIGTERM\); training goes on from (\S+)\.", (folder / "log").read_text())
    assert kept, (folder / "log").read_text()

    before, job = points(folder), slurm.submit(folder)
    wait_for("training again", folder, slurm, lambda: points(folder) > before)
    assert f"going on from {kept[1]}" in (folder / "log").read_text()
    assert left(folder)
    slurm.ask("scancel", job)
    wait_for("the end", folder, slurm, lambda: slurm.show(job, "JobState") == "CANCELLED")
    wait_for("no process", folder, slurm, lambda: not left(folder))
    assert slurm.show(job, "Restarts") == "0"


def left(folder: Path) -> list[str]:
    """Command lines of the processes of a job, which are told by a variable of their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("RAYDETR") == str(folder / "raydetr"):
                found.append(" ".join(process.cmdline()))
    return found
