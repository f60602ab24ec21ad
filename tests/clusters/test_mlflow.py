"""MLflow on SQLite and on PostgreSQL under outages: a server that dies, requests of which each is cut once, and
processes at once. What it holds afterwards is everything, and once.
"""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pipeline.errors import TrackingError
from pipeline.registry import package
from pipeline.registry.aliases import standing_of
from pipeline.tracking import tracker as tracking
from tests.builders import write_checkpoint
from tests.pipeline.registry import test_transaction as registration
from tests.pipeline.tracking.test_outbox import check_all, do_all, open_run, write_points
from tests.servers import CuttingClient, MlflowServer, Postgres

PROMOTE = """
import sys
from pipeline.registry.aliases import promote, roll_back
from pipeline.tracking.server import connect
client, name = connect(sys.argv[1]), sys.argv[2]
for round in range(2):
    promote(client, name, sys.argv[3], f"round {round}")
    roll_back(client, name, "back")
"""


MAKE = (
    "import sys; from pathlib import Path; from pipeline.tracking import Tracker\n"
    "run = Path(sys.argv[1]); print(Tracker(sys.argv[2], 'e', run.name, run / 'mlflow_run.json', required=True).run_id)"
)


def make(run: Path, uri: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", MAKE, str(run), uri]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.0)


@pytest.fixture
def server(outage_server: MlflowServer) -> Iterator[MlflowServer]:
    yield outage_server
    outage_server.start()


@pytest.fixture
def uri(server: MlflowServer, mlflow_uri: str) -> str:
    """A SQLite database that is opened without a server, and the server on PostgreSQL."""
    return server.uri if server.postgres else mlflow_uri


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One whose versions are without a network: what is asked of MLflow is the same, and takes no second."""

    def write(detector: Any, folder: Path, card: Any) -> None:
        folder.mkdir(parents=True)
        (folder / "MLmodel").write_text("flavors: {}\n")

    monkeypatch.setattr(package, "write_model", write)
    return write_checkpoint(tmp_path / "checkpoint", registration.LABELS)


def test_a_server_that_dies_gets_everything_once(server: MlflowServer, tmp_path: Path) -> None:
    """The server dies before one run, midway, before a run is continued, and at the end; then it comes back."""
    runs = {when: tmp_path / when for when in ("before", "midway", "continued", "end", "patient", "never")}
    for run in runs.values():
        write_points(run, 1, 2)
    trackers = {when: open_run(server.uri, run) for when, run in runs.items() if when not in ("before", "patient")}
    trackers["midway"].log_points(runs["midway"] / "spool" / "train.jsonl")
    trackers["continued"].start()
    do_all(trackers["end"], runs["end"])
    do_all(trackers["never"], runs["never"])
    server.kill()
    for when in ("before", "patient", "continued"):
        trackers[when] = open_run(server.uri, runs[when])
    for when in ("before", "patient", "midway", "continued"):
        do_all(trackers[when], runs[when])
    for status in ("KILLED", "FINISHED"):
        trackers["end"].finish(status)
    for when in ("before", "midway", "continued", "end"):
        with pytest.raises(TrackingError, match=r"the work is done, and \d+ uploads wait in .*track sync -c FILE"):
            trackers[when].settle(patience=0)
    trackers["patient"].settle(patience=120, on_wait=server.start)
    for when, run in runs.items():
        tracker = trackers[when] if when in ("patient", "never") else open_run(server.uri, run)
        tracker.settle(patience=0)
        check_all(tracker, run.name)


@pytest.mark.parametrize("is_done", [False, True], ids=["before", "after"])
def test_uploads_are_cut_at_every_request(
    uri: str, tmp_path: Path, is_done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tracking.connect
    cut = 0
    while True:
        cut += 1
        run = tmp_path / f"cut-{cut}-{is_done}"
        write_points(run, 1, 2)
        clients: list[CuttingClient] = []

        def connect(uri: str, cut: int = cut, clients: list[CuttingClient] = clients) -> Any:
            clients.append(CuttingClient(real(uri), cut, is_done=is_done))
            return clients[-1]

        monkeypatch.setattr(tracking, "connect", connect)
        do_all(open_run(uri, run), run)
        if clients[0].requests < cut:
            break
        monkeypatch.setattr(tracking, "connect", real)
        tracker = open_run(uri, run)
        tracker.settle(patience=0)
        check_all(tracker, run.name)
    assert cut > 10


@pytest.mark.parametrize("is_done", [False, True], ids=["before", "after"])
def test_a_registration_is_cut_at_every_request(uri: str, checkpoint: Path, tmp_path: Path, is_done: bool) -> None:
    cut = 0
    while True:
        cut += 1
        name = f"cut-{is_done}-{cut}"
        tracker = registration.open_run(uri, tmp_path / name)
        client = CuttingClient(tracker.client, cut, is_done=is_done)
        tracker._client = client
        made = registration.make_version(tracker, checkpoint, name)
        if client.requests < cut:
            assert made is not None
            break
        assert made is None
        assert tracker.waiting() == 1
        again = registration.open_run(uri, tmp_path / name)
        again.settle(patience=0)
        registration.check(again, name)
    assert cut > 12


def test_a_server_that_dies_at_registration(server: MlflowServer, checkpoint: Path, tmp_path: Path) -> None:
    tracker = registration.open_run(server.uri, tmp_path)
    server.kill()
    try:
        assert registration.make_version(tracker, checkpoint, "outage") is None
        assert tracker.waiting() == 1
    finally:
        server.start()
    again = registration.open_run(server.uri, tmp_path)
    again.settle(patience=0)
    registration.check(again, "outage")


@contextmanager
def read_only(postgres: Postgres) -> Iterator[None]:
    """Have PostgreSQL take nothing, as one does that is replaced by another."""

    def restart(state: str) -> None:
        with psycopg.connect(postgres.uri, autocommit=True) as connection:
            connection.execute("set default_transaction_read_only = off")
            connection.execute(f"alter system set default_transaction_read_only = {state}".encode())
        postgres.kill()
        postgres.start()

    restart("on")
    try:
        yield
    finally:
        restart("off")


def test_a_database_that_is_read_only(postgres_server: MlflowServer, tmp_path: Path) -> None:
    """The server answers BAD_REQUEST to all that is written."""
    assert postgres_server.postgres is not None
    write_points(tmp_path, 1, 2)
    tracker = open_run(postgres_server.uri, tmp_path)
    with read_only(postgres_server.postgres):
        do_all(tracker, tmp_path)
        with pytest.raises(TrackingError, match=r"the work is done, and \d+ uploads wait in .*track sync -c FILE"):
            tracker.settle(patience=0)
    tracker.settle(patience=0)
    check_all(tracker, tmp_path.name)
    assert not (tracker.outbox.folder / "refused.jsonl").exists()


def test_two_shells_that_promote_and_roll_back_at_once(uri: str) -> None:
    """Whoever comes first, each promotion is undone by the rollback after it or by the other's: none is lost."""
    client, name = tracking.connect(uri), "shells"
    client.create_registered_model(name)
    for _ in range(3):
        client.create_model_version(name, "s3://bucket/model")
    client.set_registered_model_alias(name, "champion", "2")
    shells = [
        subprocess.Popen([sys.executable, "-c", PROMOTE, uri, name, version], env=os.environ) for version in ("1", "3")
    ]
    assert [shell.wait(300) for shell in shells] == [0, 0]
    after = standing_of(client.get_registered_model(name))
    assert [change.number for change in after.changes] == list(range(1, 9))
    assert after.done == 8
    state = {"champion": "2"}
    for change in after.changes:  # each began with what the one before it left
        if change.action == "rollback":
            assert change.aliases == {"champion": state["previous"], "previous": state["champion"]}
        elif change.aliases["champion"] != state["champion"]:
            assert change.aliases["previous"] == state["champion"]
        state = change.aliases
    assert after.aliases == state
    locks = [model.name for model in client.search_registered_models() if "lock" in model.name]
    assert not locks


def test_a_database_is_made_by_two_at_once_after_one_was_killed(tmp_path: Path) -> None:
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
