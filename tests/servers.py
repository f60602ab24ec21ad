"""A real `mlflow server` over HTTP and PostgreSQL that tests kill and bring back, and what fails on the way to them: a
proxy, and a client.
"""

import http.client
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
"""The programs of Debian's PostgreSQL; None where they are missing."""


class Postgres:
    """A PostgreSQL of its own behind a socket, whose data end with `remove`. Root has it run as the user postgres."""

    def __init__(self) -> None:
        self._user = "postgres" if os.getuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp())  # that of a test is closed to other users, and a socket's name is short
        if self._user:
            shutil.chown(self.folder, self._user, self._user)
        self.uri = f"postgresql:///postgres?host={self.folder}&user=mlflow"
        self._process: subprocess.Popen[bytes] | None = None
        initdb = self._begin("initdb", "--username=mlflow", "--auth=trust", "--encoding=UTF8", "--no-sync")
        assert initdb.wait() == 0, self._said()

    def start(self) -> None:
        """Bring it up with what it had, unless it is up, and wait until it takes connections."""
        if self._process is not None:
            return
        self._process = self._begin("postgres", "-k", str(self.folder), "-c", "listen_addresses=", "-c", "fsync=off")
        end = time.monotonic() + 180
        while self._begin("pg_isready").wait() != 0:
            assert self._process.poll() is None, self._said()
            assert time.monotonic() < end, self._said()
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill it and all its processes, as a power cut would."""
        if self._process is not None and self._process.poll() is None:
            children = psutil.Process(self._process.pid).children()
            self._process.kill()
            for process in children:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait()
            psutil.wait_procs(children)
        self._process = None

    def remove(self) -> None:
        """End it, with its data."""
        self.kill()
        shutil.rmtree(self.folder)

    def _begin(self, program: str, *words: str) -> "subprocess.Popen[bytes]":
        assert POSTGRES is not None
        environment = os.environ | {"PGDATA": str(self.folder / "data"), "PGHOST": str(self.folder)}
        who: dict[str, Any] = {"user": self._user, "group": self._user, "extra_groups": []} if self._user else {}
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [POSTGRES / program, *words], cwd=self.folder, stdout=log, stderr=log, env=environment,
                start_new_session=True, **who,
            )  # fmt: skip

    def _said(self) -> str:
        return (self.folder / "log").read_text()


class MlflowServer:
    """A tracking server of its own on a free port; starting it takes seconds.

    Args:
        folder: for its files.
        host: address that it listens at.
        postgres: its database; SQLite where there is none.
    """

    def __init__(self, folder: Path, host: str = "127.0.0.1", postgres: Postgres | None = None) -> None:
        self.folder, self._host, self.postgres = folder, host, postgres
        self.database = postgres.uri if postgres else f"sqlite:///{folder}/mlflow.db"
        folder.mkdir(parents=True, exist_ok=True)
        with socket.create_server((host, 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://{host}:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Bring it and its database up with what they had, unless they are up, and wait until it answers."""
        if self.postgres is not None:
            self.postgres.start()
        if self._process is not None:
            return
        command = [sys.executable, "-m", "mlflow", "server", "--host", self._host, "--port", str(self.port)]
        command += ["--backend-store-uri", self.database, "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "log").open("ab") as log:
            environment = os.environ | {  # its processes for jobs, which none here begins, take longer than the server
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            }
            self._process = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True, env=environment
            )
        for _ in range(1800):  # minutes where all its cores are busy
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise TimeoutError((self.folder / "log").read_text())

    def kill(self) -> None:
        """Kill it and all its workers, as a power cut would, but not PostgreSQL."""
        if self._process is not None:
            with suppress(ProcessLookupError):  # a test of Ray has ended all that this process had begun
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class Detour:
    """A way to a server on which requests take their time, or are answered 500: before they are done, or after.

    Args:
        target: address of the server.
        seconds: that each request takes longer.
        rate: of requests that are answered 500.
    """

    def __init__(self, target: str, seconds: float = 0.0, rate: float = 0.0) -> None:
        self.target, self.seconds, self.rate = target.removeprefix("http://"), seconds, rate
        self.failed = 0
        self.random = random.Random(0)
        answers = {f"do_{method}": _Handler.answer for method in ("GET", "POST", "PUT", "PATCH", "DELETE")}
        handler = type("Handler", (_Handler,), {"detour": self, **answers})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.uri = f"http://127.0.0.1:{self.server.server_address[1]}"


@contextmanager
def detour(target: str, seconds: float = 0.0, rate: float = 0.0) -> Iterator[Detour]:
    """A detour that is open in the block."""
    made = Detour(target, seconds, rate)
    threading.Thread(target=made.server.serve_forever, daemon=True).start()
    try:
        yield made
    finally:
        made.server.shutdown()
        made.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    detour: Detour

    def answer(self) -> None:
        """Pass a request on as the detour says."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        way = self.detour
        is_failed, is_done = way.random.random() < way.rate, way.random.random() < 0.5
        way.failed += is_failed
        time.sleep(way.seconds)
        passed = self._pass(body) if is_done or not is_failed else None
        status, said, headers = passed if passed and not is_failed else (500, b"", {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def _pass(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        with closing(http.client.HTTPConnection(self.detour.target, timeout=60)) as connection:
            names = ("Authorization", "Content-Type")
            headers = {name: self.headers[name] for name in names if name in self.headers}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read(), {"Content-Type": answer.headers.get("Content-Type", "text/plain")}

    def log_message(self, *words: object) -> None:
        """What it answers is not said."""


class CuttingClient:
    """MLflow's client, of which the n-th request raises: before it is done, or after, as if its answer were lost."""

    def __init__(self, client: Any, cut: int, *, is_done: bool) -> None:
        self._inner, self._cut, self._is_done = client, cut, is_done
        self.requests = 0

    def __getattr__(self, name: str) -> Any:
        request = getattr(self._inner, name)
        if name.startswith("_") or not callable(request):
            return request

        def ask(*arguments: Any, **options: Any) -> Any:
            self.requests += 1
            if self.requests != self._cut:
                return request(*arguments, **options)
            if self._is_done:
                with suppress(Exception):  # an answer that is lost may have been a refusal
                    request(*arguments, **options)
            raise ConnectionResetError(f"cut at request {self._cut}: {name}")

        return ask
