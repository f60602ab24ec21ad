"""A real `mlflow serve` over HTTP that tests kill and bring back, and a client that fails where a test wants it to."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any


class MlflowServer:
    """A tracking server of its own on a free port; starting it takes seconds."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self.folder, self._host = folder, host
        folder.mkdir(parents=True, exist_ok=True)
        with socket.create_server((host, 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://{host}:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Bring it up with what it had, unless it is up, and wait until it answers."""
        if self._process is not None:
            return
        command = [sys.executable, "-m", "mlflow", "server", "--host", self._host, "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--workers", "1"]
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
        """Kill it and all its workers, as a power cut would."""
        if self._process is not None:
            with suppress(ProcessLookupError):  # a test of Ray has ended all that this process had begun
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


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
