"""MLflow's database under `runs`: made whole or not at all, by one of many, in the folder that was meant."""

import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config.address import sqlite_uri
from pipeline.errors import UserError
from pipeline.registry.versions import open_detector
from pipeline.tracking import server
from pipeline.tracking.tracker import Tracker

MAKE = (
    "import sys; from pathlib import Path; from pipeline.tracking import Tracker\n"
    "run = Path(sys.argv[1]); print(Tracker(sys.argv[2], 'e', run.name, run / 'mlflow_run.json', required=True).run_id)"
)


def make(run: Path, uri: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", MAKE, str(run), uri]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_while_it_is_made_and_two_at_once(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    killed = make(tmp_path / "killed", uri)
    draft = tmp_path / ".mlflow.db.making"
    end = time.monotonic() + 120
    while not (draft.exists() and draft.stat().st_size > 0):
        assert time.monotonic() < end
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "mlflow.db").exists()
    both = [make(tmp_path / name, uri) for name in ("first", "second")]
    for process in both:
        said, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert len(said.strip()) == 32
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (2,)
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "first", "second"}


@pytest.mark.parametrize("name", ["feature%2Fx", "q?x=y"])
def test_folders_whose_names_mean_something_in_an_address(mlflow_uri: str, tmp_path: Path, name: str) -> None:
    server.connect(mlflow_uri)
    folder = tmp_path / name
    (folder / "run").mkdir(parents=True)
    shutil.copyfile(mlflow_uri.removeprefix("sqlite:///"), folder / "mlflow.db")
    (folder / "run" / "note").write_text("here")
    for index, uri in enumerate((sqlite_uri(folder / "mlflow.db"), f"sqlite:///{folder}/mlflow.db")):
        tracker = Tracker(uri, f"folder {name}", f"run-{index}", folder / f"run{index}" / "mlflow_run.json")
        tracker.log_artifacts(folder / "run" / "note")
        assert [file.path for file in tracker.client.list_artifacts(tracker.run_id)] == ["note"]
    with sqlite3.connect(f"file:{sqlite_uri(folder / 'mlflow.db').removeprefix('sqlite:///')}", uri=True) as database:
        names = {row[0] for row in database.execute("select name from runs")}
    assert {"run-0", "run-1"} <= names
    assert {path.name for path in tmp_path.iterdir()} == {name}
    assert len(list((folder / "mlartifacts").rglob("note"))) == 2


@pytest.mark.parametrize("kind", ["folder", "nonsense"])
def test_a_database_that_cannot_be_opened_is_one_line(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "mlflow.db"
    file.mkdir() if kind == "folder" else file.write_text("nonsense " * 1000)
    with pytest.raises(
        UserError, match=r"the tracking server is out of order \(.*\), and tracking\.required"
    ) as caught:
        Tracker(f"sqlite:///{file}", "e", "run", tmp_path / "run" / "mlflow_run.json", required=True)
    assert "\n" not in str(caught.value)
    tracker = Tracker(f"sqlite:///{file}", "e", "run", tmp_path / "run" / "mlflow_run.json")
    tracker.log_params({"a": 1})
    assert tracker.waiting() == 1


def test_predict_tells_an_unknown_model_from_an_unknown_registry(mlflow_uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no registered model `none`"):
        open_detector("models:/none/1", mlflow_uri)
    with pytest.raises(UserError, match=r"the registry at http://127.0.0.1:9 is away"):
        open_detector("models:/none/1", "http://me:secret@127.0.0.1:9")
    with pytest.raises(UserError, match=r"there is no registry at sqlite:///.*/none/mlflow\.db"):
        open_detector("models:/none/1", f"sqlite:///{tmp_path}/none/mlflow.db")
    assert not list(tmp_path.iterdir())


def test_the_page_of_a_server_is_no_command() -> None:
    assert server.page("http://me:pw@host:5000/", "3", "abc") == "http://host:5000/#/experiments/3/runs/abc"
    assert server.page("http://host:5000", "", "") == "http://host:5000"
    assert server.page("sqlite:////a/b.db", "3", "abc") == "mlflow ui --backend-store-uri sqlite:////a/b.db"
