"""The outbox, with a real server over HTTP that fails and refuses. tests/clusters/test_mlflow.py kills it."""

import json
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import TrackingError
from pipeline.tracking import tracker as tracking
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.spool import Spool
from pipeline.tracking.tracker import Tracker
from tests.servers import MlflowServer

EXPERIMENT = "outbox"


@pytest.fixture
def server(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.0)
    mlflow_server.start()
    yield mlflow_server
    mlflow_server.start()


@pytest.fixture
def away() -> str:
    """The address of a server that is away: a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def open_run(uri: str, run: Path) -> Tracker:
    return Tracker(uri, EXPERIMENT, run.name, run / "mlflow_run.json")


def write_points(run: Path, *steps: int) -> None:
    with Spool(run / "spool" / "train.jsonl") as spool:
        for step in steps:
            spool.write(step, {"loss": 1 / step, "val_category/AP/w/": 0.5})


def do_all(tracker: Tracker, run: Path) -> None:
    """What a command has for MLflow."""
    tracker.start()
    tracker.log_params({"train": {"epochs": 3}})
    tracker.log_points(run / "spool" / "train.jsonl")
    write_points(run, 3, 4)
    tracker.sync()
    (run / "evaluate" / "pictures").mkdir(parents=True, exist_ok=True)
    (run / "evaluate" / "pictures" / "a.png").write_bytes(b"picture")
    (run / "evaluate" / "metrics.json").write_text("{}")
    tracker.log_artifacts(run / "evaluate" / "metrics.json", "evaluate")
    tracker.log_artifacts(run / "evaluate" / "pictures", "evaluate/pictures")
    tracker.finish()


def check_all(tracker: Tracker, name: str) -> None:
    """Everything is there, once."""
    client = tracker.client
    experiment = client.get_experiment_by_name(EXPERIMENT)
    (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    assert run.info.run_id == tracker.run_id
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train.epochs": "3"}
    for metric in ("loss", "val_category/AP/w/_"):
        assert [point.step for point in client.get_metric_history(run.info.run_id, metric)] == [1, 2, 3, 4]
    files = client.list_artifacts(run.info.run_id, "evaluate")
    assert {file.path for file in files} == {"evaluate/metrics.json", "evaluate/pictures"}
    assert [file.path for file in client.list_artifacts(run.info.run_id, "evaluate/pictures")] == [
        "evaluate/pictures/a.png"
    ]
    assert tracker.waiting() == 0


def record_log(monkeypatch: pytest.MonkeyPatch) -> list[logging.LogRecord]:
    """What the program logs from now on, each once, whoever else listens."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    monkeypatch.setattr(logging.getLogger("raydetr"), "handlers", [handler])
    return records


class TestOutage:
    def test_messages_are_one_line_without_the_clients_text(
        self, away: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        records = record_log(monkeypatch)
        do_all(open_run(away, tmp_path), tmp_path)
        said = [each.getMessage() for each in records if each.levelno >= logging.INFO]
        assert said == [f"tracking server {away} is away; what it is to get waits in {tmp_path / 'outbox'}"]

    def test_a_killed_process_left_half_a_line(self, tmp_path: Path) -> None:
        Outbox(tmp_path).add("params", "", {"a": "1"})
        with (tmp_path / "operations.jsonl").open("a") as file:
            file.write('{"kind": "par')
        outbox = Outbox(tmp_path)
        outbox.add("status", "", {"status": "FINISHED"})
        assert [each.kind for each in Outbox(tmp_path).pending("run")] == ["params", "status"]

    def test_what_a_signal_cuts_is_the_same_on_disk_and_in_memory(self, tmp_path: Path, monkeypatch: Any) -> None:
        outbox = Outbox(tmp_path)

        def cut(descriptor: int) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", cut)
            with pytest.raises(KeyboardInterrupt):
                outbox.add("status", "", {"status": "RUNNING"})
        outbox.add("status", "", {"status": "KILLED"})
        assert outbox.pending("") == Outbox(tmp_path).pending("")

    def test_another_server_gets_everything(self, server: MlflowServer, mlflow_uri: str, tmp_path: Path) -> None:
        write_points(tmp_path, 1, 2)
        do_all(open_run(mlflow_uri, tmp_path), tmp_path)
        tracker = open_run(server.uri, tmp_path)
        tracker.settle(patience=0)
        check_all(tracker, tmp_path.name)


class TestOneThatAlwaysFails:
    def test_the_rest_goes_on(self, server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        artifacts = server.folder / "artifacts"
        artifacts.mkdir(exist_ok=True)
        artifacts.rename(aside := artifacts.with_name("aside"))
        artifacts.write_text("the disk of the artifacts is gone: each upload is answered 500")
        try:
            records = record_log(monkeypatch)
            write_points(tmp_path, 1, 2)
            tracker = open_run(server.uri, tmp_path)
            do_all(tracker, tmp_path)
            run = tracker.client.get_run(tracker.run_id)
            assert (run.info.status, run.data.params) == ("FINISHED", {"train.epochs": "3"})
            assert len(tracker.client.get_metric_history(tracker.run_id, "loss")) == 4
            assert tracker.waiting() == 2
            with pytest.raises(TrackingError, match="2 uploads wait"):
                tracker.settle(patience=0.5)
            said = [each.getMessage() for each in records if "the rest goes on" in each.getMessage()]
            assert len(said) == 1
            assert "answers 500 when it is sent artifacts" in said[0]
        finally:
            artifacts.unlink()
            aside.rename(artifacts)
        tracker = open_run(server.uri, tmp_path)
        tracker.settle(patience=0)
        check_all(tracker, tmp_path.name)

    def test_a_later_one_of_its_subject_waits_for_it(self, mlflow_uri: str, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.0)
        is_broken, taken = True, []

        def send(tracker: Tracker, operation: Any) -> None:
            if is_broken and operation.body["number"] == 1:
                raise OSError("the disk is full")
            taken.append((operation.subject, operation.body["number"]))

        tracker = Tracker(mlflow_uri, EXPERIMENT, "order", tmp_path / "mlflow_run.json", handlers={"sent": send})
        for subject, number in (("a", 1), ("b", 3), ("a", 2), ("c", 4)):
            tracker.request("sent", subject, {"number": number})
        assert taken == [("b", 3), ("c", 4)]
        is_broken = False
        tracker.settle(patience=0)
        assert taken[2:] == [("a", 1), ("a", 2)]


class TestRefusal:
    def test_it_is_set_aside_and_blocks_nothing(
        self, server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        records = record_log(monkeypatch)
        write_points(tmp_path, 1, 2)
        tracker = open_run(server.uri, tmp_path)
        monkeypatch.setattr(tracker.outbox, "legal", lambda names: {name: name for name in names})
        tracker.log_params({"bad//key": 1, "good": 2, "..": 3})
        tracker.log_points(tmp_path / "spool" / "train.jsonl")
        tracker.finish()
        run = tracker.client.get_run(tracker.run_id)
        assert run.data.params == {"good": "2"}
        assert len(tracker.client.get_metric_history(tracker.run_id, "loss")) == 2
        assert run.info.status == "FINISHED"
        assert tracker.waiting() == 0
        lines = [json.loads(line) for line in (tmp_path / "outbox" / "refused.jsonl").read_text().splitlines()]
        assert {line["what"]["name"] for line in lines} == {"bad//key", "..", "val_category/AP/w/"}
        warnings = [each.getMessage() for each in records if "refuses" in each.getMessage()]
        assert len(warnings) == 2, "one of params, one of metrics"
        assert all("\n" not in text and "Names may" not in text for text in warnings)

    def test_files_that_are_gone_are_set_aside(self, mlflow_uri: str, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.0)
        (tmp_path / "note").write_text("")
        tracker = open_run(mlflow_uri, tmp_path)
        tracker.outbox.add("artifacts", "gone", {"folder": None, "state": ""})
        tracker.outbox.add("nonsense", "", {})
        tracker.log_artifacts(tmp_path / "note")
        assert [file.path for file in tracker.client.list_artifacts(tracker.run_id)] == ["note"]
        assert tracker.waiting() == 0

    def test_names_that_mlflow_refuses_are_made_legal(self, mlflow_uri: str, tmp_path: Path) -> None:
        names = ["w/", "w/_", "..", "a//b", ".", "x" * 250, "x" * 251]
        for step in (1, 2):
            with Spool(tmp_path / "spool" / "train.jsonl") as spool:
                spool.write(step, {f"val_category/AP/{name}": float(index) for index, name in enumerate(names)})
            tracker = open_run(mlflow_uri, tmp_path)
            tracker.log_points(tmp_path / "spool" / "train.jsonl")
        known = json.loads((tmp_path / "outbox" / "names.json").read_text())
        for index, name in enumerate(names):
            points = tracker.client.get_metric_history(tracker.run_id, known[f"val_category/AP/{name}"])
            assert [(point.step, point.value) for point in points] == [(1, index), (2, index)]
        assert not (tmp_path / "outbox" / "refused.jsonl").exists()


def test_a_param_that_changes_twice_is_a_tag_that_is_right(mlflow_uri: str, tmp_path: Path) -> None:
    for epochs in (1, 2, 1):
        open_run(mlflow_uri, tmp_path).log_params({"epochs": epochs})
    run = open_run(mlflow_uri, tmp_path).client.get_run(open_run(mlflow_uri, tmp_path).run_id)
    assert (run.data.params["epochs"], run.data.tags["continued.epochs"]) == ("1", "1")


def test_no_password_is_written_or_said(server: MlflowServer, away: str, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.log import set_up_logging; set_up_logging(level=10)\n"
        "from pipeline.tracking import Tracker\n"
        "run = Path(sys.argv[2]); tracker = Tracker(sys.argv[1], 'secret', 'run', run / 'mlflow_run.json')\n"
        "tracker.log_params({'a': 1}); print(tracker.run_id, tracker.page)\n"
        "try: tracker.settle(0)\nexcept Exception as error: print(error)"
    )
    for uri, name in ((server.uri, "up"), (away, "away")):
        secret = uri.replace("http://", "http://somebody:hunter2@")
        command = [sys.executable, "-c", code, secret, str(tmp_path / name)]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "hunter2" not in said.stdout + said.stderr
        assert uri in said.stdout
    for file in (*tmp_path.rglob("*"), *server.folder.rglob("*")):
        assert not file.is_file() or b"hunter2" not in file.read_bytes(), file
