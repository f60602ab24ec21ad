"""A plain `ray job submit` of the source tree against a head on this machine."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from model import ops
from tests.end_to_end.test_pipeline import PROJECT, SMALL

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """That of a user who guards the cluster with a token of its own, whatever Ray this test process has used."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}:{plain['PATH']}"
    return {**plain, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[str]:
    """Address of the dashboard of a head."""
    port, dashboard = free_port(), free_port()
    command = [
        RAY, "start", "--head", f"--port={port}", "--num-cpus=2", "--node-ip-address=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}",
        "--disable-usage-stats", "--block",
    ]  # fmt: skip
    with (tmp_path_factory.mktemp("head") / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    yield f"http://127.0.0.1:{dashboard}"
    # Asked to end, a head drains itself for half a minute.
    for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        each.kill()
    process.wait(timeout=60)


def submit(head: str, environment: dict[str, str], *entry_point: str) -> subprocess.CompletedProcess[str]:
    """Run a job in a copy of the source tree, to its end."""
    command = [RAY, "job", "submit", "--address", head, "--working-dir", ".", "--", *entry_point]
    for _ in range(60):  # a head takes some seconds until its dashboard, and then its job agent, answer
        result = subprocess.run(
            command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        if not any(early in result.stdout + result.stderr for early in ("Failed to connect", "No available agent")):
            break
        time.sleep(1)
    return result


def test_a_submitted_job_finishes(head: str, environment: dict[str, str], tmp_path: Path) -> None:
    settings = {**SMALL, "runs": tmp_path / "runs", "dataset.root": tmp_path / "shapes", "train.epochs": 1}
    # Every training worker refuses where it does not find the compiled operator.
    settings["cluster.require_compiled"] = ops.compiled()
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    result = submit(head, environment, "python", "-m", "jobs", "run", "-c", "jobs/configs/demo.yaml", *overrides)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "runs" / "demo" / "evaluate" / "metrics.json").is_file()
    assert "raydetr-demo" in result.stdout


@pytest.mark.skipif(not ops.compiled(), reason="the operator is not compiled here")
def test_the_compiled_operator_serves_the_packages_of_the_job(head: str, environment: dict[str, str]) -> None:
    result = submit(head, environment, "python", "-m", "tests.end_to_end.operator_of_worker")
    assert result.returncode == 0, result.stdout + result.stderr
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("{"))
    worker = json.loads(line)
    assert worker["process"] != worker["driver"]
    assert worker["compiled"]
    # The packages are the upload's, which carries no extension; that one is the installed one.
    assert "working_dir_files" in worker["model"]
    assert "working_dir_files" not in worker["extension"]
    assert worker["carried"] == []
