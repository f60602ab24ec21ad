"""Whole commands whose tracking server (on SQLite and on PostgreSQL) is away, slow or answers 500, which register at
once, or which are cut while the database is made.

What MLflow holds afterwards is what it holds of a run that nothing disturbed: everything, and once.
"""

import functools
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from pipeline.run_folder import RunFolder
from tests.clusters.test_interrupts import command
from tests.end_to_end.test_pipeline import PROJECT
from tests.servers import MlflowServer, detour

AWAY, WAITING, BACK = " is away; ", "the work is done; waiting up to ", " is back"
NO_DATABASE = " answers 503; "
SCORES = [0.05 * index for index in (3, 8, 1, 10, 5, 2, 9, 4, 7, 6)]
CUTS = 10


class Command:
    """A command that runs, and what it has said until now."""

    def __init__(self, words: list[str], log: Path) -> None:
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(words, cwd=PROJECT, stdout=file, stderr=subprocess.STDOUT)

    @property
    def said(self) -> str:
        return self._log.read_text()

    def until(self, is_so: Callable[[], bool]) -> None:
        """Wait for something that happens before the command ends."""
        end = time.monotonic() + 300
        while not is_so():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.002)

    def until_said(self, words: str) -> None:
        self.until(lambda: words in self.said)

    def succeeds(self, within: float = 300) -> None:
        assert self.process.wait(timeout=within) == 0, self.said


def words(verb: str, folder: Path, name: str, **settings: object) -> list[str]:
    """A command on the small run of a name, as `raydetr` takes it."""
    return [part for each in command(folder, name, **settings) for part in (verb.split() if each == "run" else [each])]


@functools.cache
def opened(database: str) -> sqlalchemy.Engine:
    """A database, by its address; a connection that was cut is made again."""
    options = {"timeout": 60} if database.startswith("sqlite") else {}
    return sqlalchemy.create_engine(database, connect_args=options, pool_pre_ping=True)


def ask(database: str, question: str, **values: object) -> list[Any]:
    with opened(database).connect() as connection:
        return [tuple(row) for row in connection.execute(sqlalchemy.text(question), values)]


OF_THE_MOMENT = ("images_per_second", "data_wait", "hours_left")
"""Ends of the names of curves that are other ones each time."""


def alike(text: bytes, name: str) -> bytes:
    """A text of a run of a name, whatever the name, and whatever the port of its server."""
    return re.sub(rb"127\.0\.0\.1:\d+", b"SERVER", text.replace(name.encode(), b"NAME"))


def contents(folder: Path, name: str) -> dict[str, str]:
    """The files of a folder with digests of what is in them."""
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {place: hashlib.sha256(alike(file.read_bytes(), name)).hexdigest() for place, file in files.items()}


def tracked(server: MlflowServer, name: str) -> dict[str, Any]:
    """All that a server holds of the run of a name and of the registered model of that name, but times and ids."""
    database = server.database
    ((run, status, stage),) = ask(
        database, "select run_uuid, status, lifecycle_stage from runs where name = :name", name=name
    )
    points = ask(database, "select key, step, value from metrics where run_uuid = :run", run=run)
    question = "select model_id from logged_models where source_run_id = :run and lifecycle_stage = 'active'"
    models = ask(database, question, run=run)
    ((version, source, state),) = ask(
        database, "select version, source, status from model_versions where name = :name", name=name
    )
    model = source.removeprefix("models:/")
    (artifacts,) = (server.folder / "artifacts").glob(f"*/{run}/artifacts")
    (packed,) = (server.folder / "artifacts").glob(f"*/models/{model}/artifacts")
    return {
        "run": (status, stage),
        "points": sorted((key, step, 0 if key.endswith(OF_THE_MOMENT) else value) for key, step, value in points),
        "params": {
            key: alike(value.encode(), name).decode()
            for key, value in ask(database, "select key, value from params where run_uuid = :run", run=run)
        },
        "tags": sorted(key for (key,) in ask(database, "select key from tags where run_uuid = :run", run=run)),
        "artifacts": contents(artifacts, name),
        "version": (version, state),
        "aliases": ask(database, "select alias, version from registered_model_aliases where name = :name", name=name),
        "version tags": sorted(
            ask(database, "select key, value from model_version_tags where name = :name", name=name)
        ),
        "models": [model == each for (each,) in models],
        "model outputs": [model == each for (each,) in outputs(database, run)],
        "model metrics": sorted(model_metrics(database, model)),
        "model files": sorted(contents(packed, name)),
        "weights": contents(packed / "artifacts", name),
    }


def outputs(database: str, run: str) -> list[Any]:
    return ask(database, "select destination_id from inputs where source_id = :run", run=run)


def model_metrics(database: str, model: str) -> list[Any]:
    question = "select metric_name, metric_step, metric_value, dataset_digest from logged_model_metrics"
    return ask(database, f"{question} where model_id = :model", model=model)


def left_over(server: MlflowServer) -> list[Any]:
    """Registered models without versions (such as locks), and logged models that no version is made of."""
    return ask(
        server.database,
        "select name from registered_models where name not in (select name from model_versions) union "
        "select model_id from logged_models where lifecycle_stage = 'active' "
        "and 'models:/' || model_id not in (select source from model_versions)",
    )


@pytest.fixture(scope="module")
def folder(outage_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that nothing disturbed, `unbroken`."""
    folder = tmp_path_factory.mktemp("outages")
    run(folder, outage_server.uri, "unbroken").succeeds()
    return folder


@pytest.fixture
def server(outage_server: MlflowServer) -> Iterator[MlflowServer]:
    outage_server.start()
    yield outage_server
    outage_server.start()


def run(folder: Path, uri: str, name: str) -> Command:
    """`raydetr run` on a server, with a registered model of the run's own."""
    settings = {"tracking.uri": uri, "register.model_name": name}
    return Command(words("run", folder, name, **settings), folder / f"{name}.log")


class TestServerThatIsKilled:
    def test_what_an_unbroken_run_leaves(self, folder: Path, server: MlflowServer) -> None:
        found = tracked(server, "unbroken")
        assert found["run"] == ("FINISHED", "active")
        steps = {key: [step for each, step, _ in found["points"] if each == key] for key in ("train/loss", "val/AP")}
        assert steps == {"train/loss": [1, *range(5, 61, 5)], "val/AP": [15, 30, 45, 60]}
        assert found["params"]["train.epochs"] == "20"
        assert {"evaluate/metrics.json", "evaluate/per_category.png"} < found["artifacts"].keys()
        assert len([file for file in found["artifacts"] if file.startswith("evaluate/pictures/")]) == 8
        assert (found["version"], found["aliases"]) == ((1, "READY"), [("champion", 1)])
        assert (found["models"], found["model outputs"], len(found["model metrics"])) == ([True], [True], 12)
        assert left_over(server) == []

    @pytest.mark.parametrize("moment", ["training", "end-of-training", "evaluation", "registration"])
    def test_during_the_run(self, folder: Path, server: MlflowServer, moment: str) -> None:
        """It comes back when the command has noticed: in mid-training, or when all that is left is to wait for it."""
        name = f"killed-at-{moment}"
        running = run(folder, server.uri, name)
        running.until(lambda: has_come(moment, folder, server, name))
        server.kill()
        running.until_said(AWAY if moment == "training" else WAITING)
        server.start()
        running.succeeds()
        assert BACK in running.said
        check(server, name)

    def test_before_the_run(self, folder: Path, server: MlflowServer) -> None:
        """And its database, if it has one of its own."""
        server.kill()
        if server.postgres is not None:
            server.postgres.kill()
        running = run(folder, server.uri, "killed-before")
        running.until_said(WAITING)
        server.start()
        running.succeeds()
        assert BACK in running.said
        check(server, "killed-before")


@pytest.mark.parametrize("outage_server", ["postgresql"], indirect=True)
@pytest.mark.parametrize("moment", ["training", "registration"])
def test_the_database_is_killed(folder: Path, server: MlflowServer, moment: str) -> None:
    """The server stays, and answers that it has none."""
    assert server.postgres is not None
    name = f"database-killed-at-{moment}"
    running = run(folder, server.uri, name)
    running.until(lambda: has_come(moment, folder, server, name))
    server.postgres.kill()
    running.until_said(NO_DATABASE if moment == "training" else WAITING)
    server.postgres.start()
    running.succeeds()
    assert BACK in running.said
    check(server, name)


def test_a_server_that_answers_500(folder: Path, server: MlflowServer) -> None:
    """To one request in five, which may have been done; no model of so many files gets there before that ends."""
    with detour(server.uri, rate=0.2) as way:
        running = run(folder, way.uri, "answers-500")
        running.until(lambda: way.failed >= 10)
        way.rate = 0.0
        running.succeeds()
    check(server, "answers-500")


@pytest.mark.parametrize("outage_server", ["postgresql"], indirect=True)
def test_a_slow_server(folder: Path, server: MlflowServer) -> None:
    with detour(server.uri, seconds=5.0) as way:
        run(folder, way.uri, "slow").succeeds(within=1800)
    check(server, "slow")


def has_come(moment: str, folder: Path, server: MlflowServer, name: str) -> bool:
    """Whether a run is where its server is to be killed."""
    files = RunFolder(folder / "runs" / name)
    if moment == "training":
        return files.train_spool.exists() and files.train_spool.read_bytes().count(b"\n") >= 2
    if moment == "registration":
        return has_begun_model(server, name)
    step = files.checkpoints / "checkpoint-60" / "state.json"
    return (step if moment == "end-of-training" else files.evaluation / "checkpoint-15/metrics.json").exists()


def check(server: MlflowServer, name: str) -> None:
    """All of a run is there as if nothing had disturbed it, and nothing else."""
    assert tracked(server, name) == tracked(server, "unbroken")
    assert left_over(server) == []


def has_begun_model(server: MlflowServer, name: str) -> bool:
    question = "select 1 from logged_models join runs on source_run_id = run_uuid where runs.name = :name"
    return bool(ask(server.database, question, name=name))


def copy_run(folder: Path, target: Path, score: float | None = None) -> None:
    """Copy the unbroken run without what it knows of MLflow; with a score, its last checkpoint as if it had that."""
    source = RunFolder(folder / "runs" / "unbroken")
    unknown = shutil.ignore_patterns("mlflow_run.json", "ray", "lock", "*.uploaded", "uploaded.json")
    shutil.copytree(source.path, target, ignore=unknown)
    if score is None:
        return
    made = RunFolder(target)
    for path in (made.outbox, *made.checkpoints.iterdir(), *made.evaluation.glob("checkpoint-*")):
        if path.name != "checkpoint-60":
            shutil.rmtree(path)
    for file in made.evaluation.rglob("metrics.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"AP": score}))


def test_ten_commands_register_at_once(folder: Path, server: MlflowServer) -> None:
    settings = {"tracking.uri": server.uri, "register.model_name": "rush"}
    running = []
    for index, score in enumerate(SCORES):
        copy_run(folder, folder / "runs" / f"rush-{index}", score)
    for index in range(len(SCORES)):
        name = f"rush-{index}"
        running.append(Command(words("register", folder, name, **settings), folder / f"{name}.log"))
    for each in running:
        each.succeeds()
    database = server.database
    scores = dict(
        ask(
            database,
            "select version, value from model_version_tags where name = 'rush' and key = 'raydetr.metric.AP'",
        )
    )
    assert sorted(scores) == list(range(1, 11))
    assert sorted(map(float, scores.values())) == sorted(SCORES)
    aliases = dict(ask(database, "select alias, version from registered_model_aliases where name = 'rush'"))
    assert float(scores[aliases["champion"]]) == max(SCORES)
    runs = ask(database, "select name, status from runs where name like 'rush-%' order by name")
    assert runs == [(f"rush-{index}", "FINISHED") for index in range(10)]
    models = ask(database, "select run_id, source from model_versions where name = 'rush'")
    assert len(set(models)) == 10
    assert all(outputs(database, run_id) == [(source.removeprefix("models:/"),)] for run_id, source in models)
    assert left_over(server) == []


@pytest.mark.parametrize("outage_server", ["sqlite"], indirect=True)
def test_two_commands_register_at_once(folder: Path, server: MlflowServer) -> None:
    """Twenty times, now the one and now the other the better, and both better than those before."""
    settings = {"tracking.uri": server.uri, "register.model_name": "pairs"}
    for turn in range(20):
        scores = {f"pair-{turn}-{index}": 0.02 * turn + 0.01 * (1 + (turn + index) % 2) for index in range(2)}
        for name, score in scores.items():
            copy_run(folder, folder / "runs" / name, score)
        running = [Command(words("register", folder, name, **settings), folder / f"{name}.log") for name in scores]
        for each in running:
            each.succeeds()
        question = "select version, value from model_version_tags where name = 'pairs' and key = 'raydetr.metric.AP'"
        versions = dict(ask(server.database, question))
        assert sorted(versions) == list(range(1, 2 * turn + 3))
        champion = "select version from registered_model_aliases where name = 'pairs' and alias = 'champion'"
        assert float(versions[ask(server.database, champion)[0][0]]) == pytest.approx(max(scores.values()))
    assert left_over(server) == []


@pytest.fixture(scope="module")
def uploaded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, int]]:
    """Size of a database in which `raydetr track sync` has put the unbroken run, and what is in it."""
    runs = tmp_path_factory.mktemp("uploaded") / "runs"
    copy_run(folder, runs / "unbroken")
    sync(runs).succeeds()
    return (runs / "mlflow.db").stat().st_size, rows(runs)


def sync(runs: Path) -> Command:
    settings = ["--set", "name=unbroken", "--set", f"runs={runs}"]
    program = [sys.executable, "-m", "jobs", "track", "sync", "-c", "jobs/configs/demo.yaml"]
    return Command([*program, *settings], runs.parent / "sync.log")


def rows(runs: Path) -> dict[str, int]:
    """How many rows the tables of the database of a folder have."""
    database = f"sqlite:///{runs}/mlflow.db"
    tables = [name for (name,) in ask(database, "select name from sqlite_master where type = 'table'")]
    return {name: ask(database, f'select count(*) from "{name}"')[0][0] for name in tables}


@pytest.mark.parametrize("outage_server", ["sqlite"], indirect=True)
@pytest.mark.parametrize("cut", range(CUTS))
def test_a_command_is_killed_while_the_database_grows(
    cut: int, folder: Path, uploaded: tuple[int, dict[str, int]], tmp_path: Path
) -> None:
    """From the moment that its file is there until it is nearly as large as it gets."""
    size, wanted = uploaded
    runs = tmp_path / "runs"
    copy_run(folder, runs / "unbroken")
    files = [runs / name for name in ("mlflow.db", ".mlflow.db.making")]
    killed = sync(runs)
    killed.until(lambda: any(size_of(file) >= size * cut // CUTS for file in files))
    killed.process.kill()
    killed.process.wait()
    sync(runs).succeeds()
    assert rows(runs) == wanted
    assert {path.name for path in runs.iterdir()} == {"mlflow.db", "mlartifacts", "unbroken"}


def size_of(file: Path) -> int:
    """Bytes of a file; -1 where it is not there."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return -1
