"""A registered detector, loaded with MLflow where it will be loaded, and asked over HTTP."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas  # type: ignore[import-untyped]
import pytest
import uvicorn
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel, load_model, scoring_server

from pipeline.predict.answers import MOST_PICTURES
from pipeline.predict.detector import Detector
from pipeline.registry.register import Registration
from pipeline.tracking.tracker import Tracker
from tests.builders import make_image, write_image
from tests.pipeline.registry.registered import SECTION, files_of

LOAD = """
import json, sys
from pathlib import Path
import model, pipeline
import mlflow, pandas
mine = model
mlflow.set_tracking_uri(sys.argv[1])
picture = pandas.DataFrame({"image": [Path(sys.argv[3]).read_bytes()] * 2})
answers = []
for _ in range(2):
    loaded = mlflow.pyfunc.load_model(sys.argv[2])
    answers.append(loaded.predict(picture, params={"score_threshold": 0.001}))
    assert loaded.predict(picture, params={"score_threshold": 1.0}) == [{"detections": [], "error": None}] * 2
assert answers[0] == answers[1]
assert sys.modules["model"] is mine
from model import MINE
assert (MINE, pipeline.MINE) == ("the user's", "the user's")
assert not {"ray", "deepspeed", "webdataset", "pycocotools"} & set(sys.modules)
print(json.dumps(answers[0]))
"""


def test_loads_beside_a_users_own_modules(
    tracker: Tracker, version: Registration, checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("model.py", "pipeline.py"):
        (tmp_path / name).write_text('MINE = "the user\'s"\n')
    (tmp_path / "load.py").write_text(LOAD)
    picture = write_image(tmp_path / "picture.png", 50, 40)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"  # as here: more add up in another order
    result = subprocess.run(
        [sys.executable, "load.py", tracker.uri, "models:/shown@champion", picture.name],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    expected = Detector.from_checkpoint(checkpoint, SECTION)(picture.read_bytes(), 0.001)
    assert json.loads(result.stdout) == [{"detections": expected, "error": None}] * 2
    assert len(expected) == 5


@pytest.fixture(scope="module")
def loaded(tracker: Tracker, version: Registration, tmp_path_factory: pytest.TempPathFactory) -> PyFuncModel:
    return load_model(str(files_of(tracker, version, tmp_path_factory.mktemp("version"))))


@pytest.fixture(scope="module")
def address(loaded: PyFuncModel) -> Iterator[str]:
    """Where MLflow's own application serves the version."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")  # which it sets itself; now it is taken back
        server = uvicorn.Server(uvicorn.Config(scoring_server.init(loaded), port=0, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/invocations"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image(tmp_path_factory.mktemp("pictures") / "picture.png", 50, 40)


@pytest.fixture(scope="module")
def expected(checkpoint: Path, picture: Path) -> dict[str, Any]:
    found = Detector.from_checkpoint(checkpoint, SECTION)(picture.read_bytes(), 0.001)
    assert len(found) == 5
    return {"detections": found, "error": None}


def text_of(picture: Path) -> str:
    return base64.b64encode(picture.read_bytes()).decode()


def ask(address: str, body: Any, kind: str = "application/json") -> tuple[int, Any]:
    """Status and answer of a request."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address, content, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def asked(text: Any, **params: Any) -> dict[str, Any]:
    return {"dataframe_records": [{"image": text}], "params": {"score_threshold": 0.001} | params}


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(lambda text: {"dataframe_records": [{"image": text}]}, id="records"),
        pytest.param(lambda text: {"dataframe_split": {"columns": ["image"], "data": [[text]]}}, id="split"),
        pytest.param(lambda text: {"inputs": {"image": [text]}}, id="inputs by column"),
        pytest.param(lambda text: {"inputs": [{"image": text}]}, id="inputs"),
        pytest.param(lambda text: {"instances": [{"image": text}]}, id="instances"),
    ],
)
def test_a_server_takes_every_form_of_mlflow(address: str, picture: Path, expected: Any, form: Any) -> None:
    body = form(text_of(picture)) | {"params": {"score_threshold": 0.001}}
    assert ask(address, body) == (200, {"predictions": [expected]})


def test_a_server_takes_pixels_and_tells_bad_pictures_apart(address: str, picture: Path, checkpoint: Path) -> None:
    pixels = make_image(50, 40)
    pictures = [pixels.tolist(), "/etc/hostname", text_of(picture)[:-400], None, text_of(picture)]
    status, answer = ask(address, asked("") | {"dataframe_records": [{"image": each} for each in pictures]})
    assert status == 200
    first, *bad, last = answer["predictions"]
    assert first["detections"] == Detector.from_checkpoint(checkpoint, SECTION)(pixels, 0.001)
    assert len(last["detections"]) == 5
    assert all(each["detections"] == [] and each["error"] for each in bad)


def test_the_threshold_that_is_stated_is_the_default(address: str, picture: Path) -> None:
    wanted = ask(address, asked(text_of(picture), score_threshold=0.4))
    assert ask(address, {"dataframe_records": [{"image": text_of(picture)}]}) == wanted


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        pytest.param(b"", 400, "JSON", id="empty"),
        pytest.param(b"{", 400, "JSON", id="cut off"),
        pytest.param(b"\xff\xfe", 400, "JSON", id="not UTF-8"),
        pytest.param([], 400, "list", id="a list"),
        pytest.param({}, 400, "dataframe_split", id="no pictures"),
        pytest.param({"dataframe_records": []}, 400, "image", id="no records"),
        pytest.param({"dataframe_split": {"columns": ["image"], "data": []}}, 400, "no picture", id="no rows"),
        pytest.param({"dataframe_records": [{"picture": "a"}]}, 400, "image", id="another column"),
        pytest.param(asked("") | {"dataframe_records": [{"image": "", "top": 3}]}, 400, "unknown: top", id="more"),
        pytest.param(asked("", threshold=0.5), 400, "unknown: threshold;", id="unknown parameter"),
        pytest.param(asked("", score_threshold="high"), 400, "score_threshold", id="threshold of another type"),
        pytest.param(asked("", score_threshold=1.5), 400, "not between 0 and 1", id="threshold above 1"),
        pytest.param(asked("", score_threshold=[0.5]), 400, "score_threshold", id="two thresholds"),
        pytest.param({"inputs": {"image": [""] * (MOST_PICTURES + 1)}}, 400, "65 pictures in one", id="too many"),
    ],
)
def test_a_request_that_is_wrong(address: str, picture: Path, body: Any, status: int, message: str) -> None:
    found, answer = ask(address, body)
    assert (found, message in str(answer)) == (status, True), answer
    assert "stack_trace" not in answer
    assert not re.search(r"\.py\b", answer)
    assert ask(address, asked(text_of(picture)))[0] == 200


def test_what_is_no_json_is_refused(address: str, picture: Path) -> None:
    assert ask(address, picture.read_bytes(), "image/png")[0] == 415


def test_eight_clients_at_once(address: str, picture: Path, expected: Any) -> None:
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda _: ask(address, asked(text_of(picture))), range(24)))
    assert answers == [(200, {"predictions": [expected]})] * 24


def test_what_mlflow_would_leave_out_is_refused(loaded: PyFuncModel, picture: Path) -> None:
    frame = pandas.DataFrame({"image": [picture]})
    assert loaded.predict(frame)[0]["error"] is None
    with pytest.raises(MlflowException, match="unknown: treshold; there are the column image and the parameter"):
        loaded.predict(frame, params={"treshold": 0.5})
    with pytest.raises(MlflowException, match="unknown: score_threshold;"):
        loaded.predict(frame.assign(score_threshold=0.5))
    with pytest.raises(MlflowException, match="unknown: boxes;"):
        loaded.predict({"image": [picture], "boxes": [[1]]})


def test_python_may_ask_for_more_than_a_server_takes(
    loaded: PyFuncModel, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", raising=False)
    frame = pandas.DataFrame({"image": [picture] * (MOST_PICTURES + 1)})
    assert len(loaded.predict(frame)) == MOST_PICTURES + 1


def test_its_description_asks_it(
    tracker: Tracker, version: Registration, address: str, picture: Path, expected: Any, tmp_path: Path
) -> None:
    described = tracker.client.get_model_version("shown", "1").description
    (line,) = re.findall(r"^```\n(printf .*?)\n```$", described, re.MULTILINE | re.DOTALL)
    (tmp_path / "picture.jpg").write_bytes(picture.read_bytes())
    line = line.replace("http://127.0.0.1:5001/invocations", address).replace("0.4", "0.001")
    command = ["bash", "-c", f"set -o pipefail; {line}"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert json.loads(said) == {"predictions": [expected]}
    answer = json.loads(re.findall(r'^\{"predictions".*$', described, re.MULTILINE)[0])["predictions"][0]
    assert answer.keys() == expected.keys()
    assert answer["detections"][0].keys() == expected["detections"][0].keys()
    assert tracker.client.get_model_version("shown", "1").source in described
