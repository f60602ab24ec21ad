"""Whole commands whose tracking server is away, which register at once, or which are cut while the database is made.

What MLflow holds afterwards is what it holds of a run that nothing disturbed: everything, and once.
"""

import hashlib
import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pipeline.run_folder import RunFolder
from tests.clusters.test_interrupts import command
from tests.end_to_end.test_pipeline import PROJECT
from tests.servers import MlflowServer

AWAY, WAITING, BACK = " is away; ", "the work is done; waiting up to ", " is back"
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

    def succeeds(self) -> None:
        assert self.process.wait(timeout=300) == 0, self.said


def words(verb: str, folder: Path, name: str, **settings: object) -> list[str]:
    """A command on the small run of a name, as `raydetr` takes it."""
    return [part for each in command(folder, name, **settings) for part in (verb.split() if each == "run" else [each])]


def ask(database: Path, question: str, *values: object) -> list[Any]:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60)) as opened:
        return opened.execute(question, values).fetchall()


OF_THE_MOMENT = ("images_per_second", "data_wait", "hours_left")
"""Ends of the names of curves that are other ones each time."""


def contents(folder: Path, name: str) -> dict[str, str]:
    """The files of a folder with digests of what is in them, whatever the name of the run."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(
            file.read_bytes().replace(name.encode(), b"NAME")
        ).hexdigest()
        for file in files
    }


def tracked(server: MlflowServer, name: str) -> dict[str, Any]:
    """All that a server holds of the run of a name and of the registered model of that name, but times and ids."""
    database = server.folder / "mlflow.db"
    ((run, status, stage),) = ask(database, "select run_uuid, status, lifecycle_stage from runs where name = ?", name)
    points = ask(database, "select key, step, value from metrics where run_uuid = ?", run)
    models = ask(database, "select * from logged_models where source_run_id = ? and lifecycle_stage = 'active'", run)
    ((version, source, state),) = ask(
        database, "select version, source, status from model_versions where name = ?", name
    )
    model = source.removeprefix("models:/")
    (artifacts,) = (server.folder / "artifacts").glob(f"*/{run}/artifacts")
    (packed,) = (server.folder / "artifacts").glob(f"*/models/{model}/artifacts")
    return {
        "run": (status, stage),
        "points": sorted((key, step, 0 if key.endswith(OF_THE_MOMENT) else value) for key, step, value in points),
        "params": {
            key: value.replace(name, "NAME")
            for key, value in ask(database, "select key, value from params where run_uuid = ?", run)
        },
        "tags": sorted(key for (key,) in ask(database, "select key from tags where run_uuid = ?", run)),
        "artifacts": contents(artifacts, name),
        "version": (version, state, ask(database, "select alias from registered_model_aliases where name = ?", name)),
        "version tags": sorted(ask(database, "select key, value from model_version_tags where name = ?", name)),
        "models": [model == each[0] for each in models],
        "model outputs": [model == each for (each,) in outputs(database, run)],
        "model metrics": sorted(model_metrics(database, model)),
        "model files": sorted(contents(packed, name)),
        "weights": contents(packed / "artifacts", name),
    }


def outputs(database: Path, run: str) -> list[Any]:
    return ask(database, "select destination_id from inputs where source_id = ?", run)


def model_metrics(database: Path, model: str) -> list[Any]:
    question = "select metric_name, metric_step, metric_value, dataset_digest from logged_model_metrics"
    return ask(database, f"{question} where model_id = ?", model)


def left_over(server: MlflowServer) -> list[Any]:
    """Registered models without versions (such as locks), and logged models that no version is made of."""
    database = server.folder / "mlflow.db"
    return ask(
        database,
        "select name from registered_models where name not in (select name from model_versions) union "
        "select model_id from logged_models where lifecycle_stage = 'active' "
        "and 'models:/' || model_id not in (select source from model_versions)",
    )


@pytest.fixture(scope="module")
def folder(mlflow_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that nothing disturbed, `unbroken`."""
    folder = tmp_path_factory.mktemp("outages")
    run(folder, mlflow_server, "unbroken").succeeds()
    return folder


@pytest.fixture
def server(mlflow_server: MlflowServer) -> Iterator[MlflowServer]:
    mlflow_server.start()
    yield mlflow_server
    mlflow_server.start()


def run(folder: Path, server: MlflowServer, name: str) -> Command:
    """`raydetr run` on a server, with a registered model of the run's own."""
    settings = {"tracking.uri": server.uri, "register.model_name": name}
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
        assert found["version"] == (1, "READY", [("champion",)])
        assert (found["models"], found["model outputs"], len(found["model metrics"])) == ([True], [True], 12)
        assert left_over(server) == []

    @pytest.mark.parametrize("moment", ["training", "end-of-training", "evaluation", "registration"])
    def test_during_the_run(self, folder: Path, server: MlflowServer, moment: str) -> None:
        """It comes back when the command has noticed: in mid-training, or when all that is left is to wait for it."""
        name = f"killed-at-{moment}"
        files = RunFolder(folder / "runs" / name)

        def has_come() -> bool:
            if moment == "training":
                return files.train_spool.exists() and files.train_spool.read_bytes().count(b"\n") >= 2
            if moment == "registration":
                return has_begun_model(server, name)
            step = files.checkpoints / "checkpoint-60" / "state.json"
            return (step if moment == "end-of-training" else files.evaluation / "checkpoint-15/metrics.json").exists()

        running = run(folder, server, name)
        running.until(has_come)
        server.kill()
        running.until_said(AWAY if moment == "training" else WAITING)
        server.start()
        running.succeeds()
        assert BACK in running.said
        assert tracked(server, name) == tracked(server, "unbroken")
        assert left_over(server) == []

    def test_before_the_run(self, folder: Path, server: MlflowServer) -> None:
        server.kill()
        running = run(folder, server, "killed-before")
        running.until_said(WAITING)
        server.start()
        running.succeeds()
        assert BACK in running.said
        assert tracked(server, "killed-before") == tracked(server, "unbroken")
        assert left_over(server) == []


def has_begun_model(server: MlflowServer, name: str) -> bool:
    question = "select 1 from logged_models join runs on source_run_id = run_uuid where runs.name = ?"
    return bool(ask(server.folder / "mlflow.db", question, name))


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
    database = server.folder / "mlflow.db"
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


@pytest.fixture(scope="module")
def uploaded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, int]]:
    """Size of a database in which `raydetr track sync` has put the unbroken run, and what is in it."""
    runs = tmp_path_factory.mktemp("uploaded") / "runs"
    copy_run(folder, runs / "unbroken")
    sync(runs).succeeds()
    return (runs / "mlflow.db").stat().st_size, rows(runs / "mlflow.db")


def sync(runs: Path) -> Command:
    settings = ["--set", "name=unbroken", "--set", f"runs={runs}"]
    program = [sys.executable, "-m", "jobs", "track", "sync", "-c", "jobs/configs/demo.yaml"]
    return Command([*program, *settings], runs.parent / "sync.log")


def rows(database: Path) -> dict[str, int]:
    """How many rows the tables of a database have."""
    tables = [name for (name,) in ask(database, "select name from sqlite_master where type = 'table'")]
    return {name: ask(database, f'select count(*) from "{name}"')[0][0] for name in tables}


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
    assert rows(runs / "mlflow.db") == wanted
    assert {path.name for path in runs.iterdir()} == {"mlflow.db", "mlartifacts", "unbroken"}


def size_of(file: Path) -> int:
    """Bytes of a file; -1 where it is not there."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return -1
