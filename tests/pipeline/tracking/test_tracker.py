"""The tracker, with a real MLflow on SQLite."""

import json
import logging
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import TrackingError, UserError
from pipeline.tracking.outbox import Operation
from pipeline.tracking.spool import Spool
from pipeline.tracking.tracker import Tracker


@pytest.fixture
def uri(mlflow_uri: str) -> str:
    return mlflow_uri


@pytest.fixture
def tracker(uri: str, tmp_path: Path) -> Tracker:
    return Tracker(uri, "experiment", tmp_path.name, tmp_path / "mlflow.json")


def history(tracker: Tracker, name: str) -> list[tuple[int, float, int]]:
    """All points of a curve: (step, value, milliseconds)."""
    points = tracker.client.get_metric_history(tracker.run_id, name)
    return sorted((point.step, point.value, point.timestamp) for point in points)


class TestTracker:
    def test_points_keep_step_and_time(self, tracker: Tracker, tmp_path: Path, clock: Callable[[], float]) -> None:
        spool = Spool(tmp_path / "spool", clock)
        spool.write(10, {"loss": 2.0, "AP @ cat: 7%": float("nan")})
        spool.write(20, {"loss": 1.0})
        assert tracker.drain(tracker.reader(spool.path)) == 3
        assert history(tracker, "loss") == [(10, 2.0, 1_700_000_000_000), (20, 1.0, 1_700_000_001_000)]
        assert [step for step, _, _ in history(tracker, "AP _ cat_ 7_")] == [10]

    def test_more_than_one_batch(self, tracker: Tracker, tmp_path: Path) -> None:
        spool = Spool(tmp_path / "spool")
        spool.write(1, {f"m{index}": 1.0 for index in range(1200)})
        spool.write(2, {f"m{index}": 1.0 for index in range(1200)})
        assert tracker.drain(tracker.reader(spool.path)) == 2400
        assert len(history(tracker, "m1199")) == 2

    def test_a_restart_continues_the_run_and_doubles_nothing(self, uri: str, tmp_path: Path) -> None:
        first = Tracker(uri, "experiment", "run", tmp_path / "mlflow.json")
        with Spool(tmp_path / "spool") as spool:
            spool.write(1, {"loss": 3.0})
            spool.write(2, {"loss": 2.0})
        first.drain(first.reader(tmp_path / "spool"))
        second = Tracker(uri, "experiment", "run", tmp_path / "mlflow.json")
        assert second.run_id == first.run_id
        with Spool(tmp_path / "spool") as spool:
            spool.write(2, {"loss": 2.0})
            spool.write(3, {"loss": 1.0})
        assert second.drain(second.reader(tmp_path / "spool")) == 1
        assert [step for step, _, _ in history(second, "loss")] == [1, 2, 3]

    def test_a_point_that_comes_late_is_kept_and_one_that_is_repeated_is_not(
        self, tracker: Tracker, tmp_path: Path
    ) -> None:
        """A checkpoint may be scored after a later one; a restart writes steps again, with other values."""
        with Spool(tmp_path / "spool") as spool:
            for step in (6, 3, 6, 9, 3, 9):
                spool.write(step, {"AP": 0.1 * step})
        assert tracker.drain(tracker.reader(tmp_path / "spool")) == 3
        with Spool(tmp_path / "spool") as spool:
            for step, value in ((4, 0.4), (6, 0.7), (4, 0.5), (12, 1.0)):
                spool.write(step, {"AP": value})
        assert tracker.drain(tracker.reader(tmp_path / "spool")) == 2
        found = [(step, round(value, 6)) for step, value, _ in history(tracker, "AP")]
        assert found == [(3, 0.3), (4, 0.4), (6, 0.6), (9, 0.9), (12, 1.0)]

    def test_a_lost_offset_doubles_nothing(self, tracker: Tracker, tmp_path: Path) -> None:
        with Spool(tmp_path / "spool") as spool:
            spool.write(1, {"loss": 3.0})
        tracker.drain(tracker.reader(tmp_path / "spool"))
        (tmp_path / "spool.uploaded").unlink()
        tracker.drain(tracker.reader(tmp_path / "spool"))
        assert len(history(tracker, "loss")) == 1

    def test_params_tags_artifacts_and_end(self, tracker: Tracker, tmp_path: Path) -> None:
        tracker.log_params({"train": {"epochs": 3, "lr": 0.1}, "long": "x" * 10_000})
        tracker.log_params({"train": {"epochs": 5, "lr": 0.1}})
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "note.txt").write_text("hello")
        tracker.log_artifacts(tmp_path / "folder", "pictures")
        tracker.finish()
        run = tracker.client.get_run(tracker.run_id)
        assert run.info.status == "FINISHED"
        assert run.data.params["train.epochs"] == "3"
        assert run.data.tags["continued.train.epochs"] == "5"
        assert "continued.train.lr" not in run.data.tags
        assert [file.path for file in tracker.client.list_artifacts(tracker.run_id, "pictures")] == [
            "pictures/note.txt"
        ]
        assert not Path("mlruns").exists()

    def test_a_kill_overtakes_what_waits_and_what_was_wanted_before(self, uri: str, tmp_path: Path) -> None:
        statuses: list[str] = []

        def look(tracker: Tracker, operation: Operation) -> None:
            statuses.append(tracker.client.get_run(tracker.run_id).info.status)
            raise OSError("cut")

        tracker = Tracker(uri, "experiment", "run", tmp_path / "mlflow.json", handlers={"slow": look})
        tracker.start()
        tracker.request("slow", "", {})
        tracker.kill()
        tracker._next_try = 0.0
        tracker.sync()
        assert statuses == ["RUNNING", "KILLED"]
        again = Tracker(uri, "experiment", "run", tmp_path / "mlflow.json", handlers={"slow": lambda *_: None})
        again.start()
        assert again.client.get_run(again.run_id).info.status == "RUNNING"
        assert again.waiting() == 0

    def test_a_kill_ends_a_run_whose_making_was_cut(self, uri: str, tmp_path: Path) -> None:
        tracker = Tracker(uri, "experiment", tmp_path.name, tmp_path / "mlflow.json", reach=False)
        real = tracker.client

        class Cut(BaseException):
            pass

        class Client:
            def create_run(self, *arguments: object) -> None:
                real.create_run(*arguments)
                raise Cut

            def __getattr__(self, name: str) -> object:
                return getattr(real, name)

        tracker._client = Client()
        with pytest.raises(Cut):
            tracker.reach()
        tracker.kill()
        experiment = real.get_experiment_by_name("experiment").experiment_id
        (run,) = real.search_runs([experiment], f"attributes.run_name = '{tmp_path.name}'")
        assert run.info.status == "KILLED"

    def test_a_kill_keeps_an_end_that_is_wanted_by_now(self, tracker: Tracker) -> None:
        tracker.start()
        tracker.finish()
        tracker.kill()
        assert tracker.client.get_run(tracker.run_id).info.status == "FINISHED"

    def test_a_run_that_is_killed_before_it_starts_stays_killed(self, uri: str, tmp_path: Path) -> None:
        tracker = Tracker(uri, "experiment", "run", tmp_path / "mlflow_run.json")
        tracker.kill()
        tracker.start()
        assert tracker.client.get_run(tracker.run_id).info.status == "KILLED"

    def test_a_run_that_is_killed_before_it_is_made_is_not_made(self, uri: str, tmp_path: Path) -> None:
        tracker = Tracker(uri, "experiment", "run", tmp_path / "mlflow_run.json", reach=False)
        tracker.kill()
        tracker.reach()
        tracker.start()
        assert not tracker.run_id
        assert tracker.waiting() == 1, "its end, for the next command"

    def test_a_run_that_is_gone_is_made_anew(self, uri: str, tmp_path: Path) -> None:
        (tmp_path / "mlflow.json").write_text(json.dumps({"uri": uri, "experiment": "e", "run_id": "0" * 32}))
        assert Tracker(uri, "experiment", "run", tmp_path / "mlflow.json").run_id != "0" * 32

    def test_a_broken_run_file_is_named(self, uri: str, tmp_path: Path) -> None:
        (tmp_path / "mlflow.json").write_text("{")
        with pytest.raises(UserError, match=r"mlflow\.json"):
            Tracker(uri, "experiment", "run", tmp_path / "mlflow.json")


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a server that is away: a port that was free a moment ago."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


class TestOutage:
    def test_a_new_run_waits_for_the_server(self, away: str, tmp_path: Path) -> None:
        assert not Tracker(away, "experiment", "run", tmp_path / "mlflow.json").run_id

    def test_a_server_that_is_required_is_refused(self, away: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=rf"{away}.*is away.*Start the server"):
            Tracker(away, "experiment", "run", tmp_path / "mlflow.json", required=True)
        assert not (tmp_path / "mlflow.json").exists()

    def test_nothing_is_lost(self, uri: str, away: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "mlflow.json").write_text(json.dumps({"uri": away, "experiment": "e", "run_id": "0" * 32}))
        logging.getLogger("raydetr").addHandler(caplog.handler)
        lost = Tracker(away, "experiment", "run", tmp_path / "mlflow.json")
        reader = lost.reader(tmp_path / "spool")
        with Spool(tmp_path / "spool") as spool:
            spool.write(1, {"loss": 3.0})
            assert lost.drain(reader) == 0
            spool.write(2, {"loss": 2.0})
            assert lost.drain(reader) == 0
            assert reader.offset == 0
        lost.log_points(tmp_path / "spool")
        lost.log_params({"a": 1})
        logging.getLogger("raydetr").removeHandler(caplog.handler)
        said = {record.getMessage() for record in caplog.records}
        assert said == {f"tracking server {away} is away; what it is to get waits in {tmp_path / 'outbox'}"}
        with pytest.raises(TrackingError, match=r"3 uploads wait in .*outbox: .*track sync"):
            lost.settle(patience=0)
        back = Tracker(uri, "experiment", "run", tmp_path / "mlflow.json")
        back.settle(patience=0)
        assert [step for step, _, _ in history(back, "loss")] == [1, 2]
        assert back.client.get_run(back.run_id).data.params == {"a": "1"}
