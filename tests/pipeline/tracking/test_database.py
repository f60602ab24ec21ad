"""MLflow's database under `runs`, in the folder that was meant. tests/clusters/test_mlflow.py cuts its making."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from pipeline.config.address import sqlite_uri
from pipeline.errors import UserError
from pipeline.registry.versions import open_detector
from pipeline.tracking import server
from pipeline.tracking.tracker import Tracker


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
