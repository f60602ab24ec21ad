"""A Ray head on this machine, to which tests submit jobs as users do."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

PROJECT = Path(__file__).resolve().parents[1]
RAY = str(Path(sys.executable).with_name("ray"))

OTHER_NODE = """
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False)
head = "node:__internal_head__"
print(*[node["NodeID"] for node in ray.nodes() if node["Alive"] and head not in node["Resources"]])
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


class RayHead:
    """A head by its dashboard, and the environment of a user who guards it with a token.

    Args:
        address: of its dashboard.
        cluster: host:port of its Ray.
        environment: of the user's commands.
    """

    def __init__(self, address: str, cluster: str, environment: dict[str, str]) -> None:
        self.address, self.cluster, self.environment = address, cluster, environment

    @contextmanager
    def node(self, folder: Path, cpus: int, **resources: float) -> Iterator[None]:
        """Another node on this machine, which is lost at the end of the block."""
        command = [
            RAY, "start", f"--address={self.cluster}", f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1",
            f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats", "--block",
            f"--resources={json.dumps(resources)}",
        ]  # fmt: skip
        with _running(command, self.environment, folder / "node.log"):
            yield

    def drain(self, deadline: int) -> None:
        """Tell Ray that the node beside the head's is taken away after so many seconds."""
        listed = subprocess.run(
            [sys.executable, "-c", OTHER_NODE, self.cluster],
            env=self.environment, check=True, capture_output=True, text=True,
        )  # fmt: skip
        node = listed.stdout.split()[-1]
        words = ["--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken away"]
        subprocess.run(
            [RAY, "drain-node", "--address", self.cluster, *words, "--deadline-remaining-seconds", str(deadline)],
            env=self.environment, check=True, capture_output=True,
        )  # fmt: skip

    def submit(self, *entry_point: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Run a job in a copy of the source tree, to its end unless an option says otherwise."""
        command = [RAY, "job", "submit", "--address", self.address, "--working-dir", ".", *options, "--", *entry_point]
        for _ in range(60):  # a head takes some seconds until its dashboard, and then its job agent, answer
            result = subprocess.run(
                command, cwd=PROJECT, env=self.environment, capture_output=True, text=True, timeout=300, check=False
            )
            if not any(early in result.stdout + result.stderr for early in ("Failed to connect", "No available agent")):
                break
            time.sleep(1)
        return result

    def stop(self, job: str) -> None:
        """What `ray job stop` asks of the head, without the seconds that the command takes to start."""
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(f"{self.address}/api/jobs/{job}/stop", headers=token, method="POST")
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer) == {"stopped": True}


@contextmanager
def ray_head(
    folder: Path,
    cpus: int = 2,
    path: str = f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    **resources: float,
) -> Iterator[RayHead]:
    """A head in the block, on free ports, whatever Ray this test process has used; its log is in the folder."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = {**plain, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    dashboard, port = free_port(), free_port()
    command = [
        RAY, "start", "--head", f"--port={port}", f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}",
        f"--resources={json.dumps(resources)}", "--disable-usage-stats", "--block",
    ]  # fmt: skip
    with _running(command, environment, folder / "head.log"):
        yield RayHead(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", environment)


@contextmanager
def _running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        yield
    finally:
        # Asked to end, a node drains itself for half a minute.
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            each.kill()
        process.wait(timeout=60)
