"""`mlflow models serve` as the README and a version's page give it, here and in an environment of the version's own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.predict.detector import Detector
from pipeline.tracking.tracker import Tracker
from tests.builders import write_checkpoint, write_image
from tests.pipeline.registry.registered import LABELS, SECTION, files_of, register_some

README = Path(__file__).resolve().parents[2] / "README.md"
SECONDS = 300


class Registry:
    """One with the model `cells`, and a picture with what it finds there."""

    def __init__(self, folder: Path) -> None:
        (folder / "runs").mkdir()
        self.folder = folder
        self.tracker = Tracker(f"sqlite:///{folder}/runs/mlflow.db", "serving", "run", folder / "mlflow.json")
        checkpoint = write_checkpoint(folder / "checkpoint", LABELS)
        self.version = register_some(self.tracker, checkpoint, "cells")
        picture = write_image(folder / "picture.jpg", 50, 40).read_bytes()
        found = Detector.from_checkpoint(checkpoint, SECTION)(picture, 0.001)
        self.expected = {"predictions": [{"detections": found, "error": None}]}

    def description(self) -> str:
        return str(self.tracker.client.get_model_version("cells", str(self.version.version)).description)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(tmp_path_factory.mktemp("registry"))


def lines_of(text: str) -> tuple[str, str]:
    """How a model is served, and how it is asked; with a free port, and a threshold that what knows nothing reaches."""
    served = re.search(r"^(export MLFLOW_TRACKING_URI=.*\n)?mlflow models serve .*$", text, re.MULTILINE)
    asked = re.search(r"^printf '.*\n.*curl .*$", text, re.MULTILINE)
    assert served is not None
    assert asked is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    return served[0].replace("5001", port), asked[0].replace("5001", port).replace("0.4}", "0.001}")


@contextmanager
def serving(line: str, registry: Registry, bin_folder: Path) -> Iterator[str]:
    """A server that a line begins, with what `bin_folder` holds; its address."""
    folder = registry.folder
    left_out = ("PYTHONPATH", "MLFLOW_TRACKING_URI")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    environment |= {"PATH": f"{bin_folder}:{environment['PATH']}", "OMP_NUM_THREADS": "1"}
    if "MLFLOW_TRACKING_URI" not in line:
        environment["MLFLOW_TRACKING_URI"] = registry.tracker.uri
    address = "http://127.0.0.1:" + line.rpartition(" ")[2]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            ["bash", "-c", line], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        end = time.monotonic() + SECONDS
        while not answers(f"{address}/ping"):
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.1)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=1).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


def said(line: str, folder: Path) -> Any:
    """What a line prints, as JSON."""
    command = ["bash", "-c", f"set -o pipefail; {line}"]
    return json.loads(subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("where", ["readme", "description"])
def test_the_lines_as_they_stand(registry: Registry, where: str) -> None:
    text = README.read_text(encoding="utf-8") if where == "readme" else registry.description()
    serve, ask = lines_of(text)
    with serving(serve, registry, Path(sys.executable).parent) as address:
        assert said(ask, registry.folder) == registry.expected
        for body, status in ((b"", 400), (b"{", 400), (b'{"inputs": {"image": [%s]}}' % (b'"",' * 64 + b'""'), 400)):
            request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=60)
            assert refused.value.code == status
        assert said(ask, registry.folder) == registry.expected


def test_from_its_own_requirements(registry: Registry, tmp_path: Path) -> None:
    """An environment that has what the version names, and nothing of this project."""
    needed = files_of(registry.tracker, registry.version, tmp_path / "version") / "requirements.txt"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([tmp_path / "venv" / "bin" / "pip", "install", "--quiet", "-r", needed], check=True)
    serve, ask = lines_of(registry.description())
    with serving(serve, registry, tmp_path / "venv" / "bin"):
        (answer,) = said(ask, registry.folder)["predictions"]
    (expected,) = registry.expected["predictions"]
    for found, wanted in zip(answer["detections"], expected["detections"], strict=True):
        assert found["category"] == wanted["category"]
        # plain torch instead of the compiled operator, which may round otherwise
        assert [found["score"], *found["bbox"]] == pytest.approx([wanted["score"], *wanted["bbox"]], rel=1e-4, abs=1e-4)
