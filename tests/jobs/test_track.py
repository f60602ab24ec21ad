"""`raydetr track sync`, and which checkpoint a run registers."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from jobs import run as running
from jobs.register import best_checkpoint
from jobs.track import nest, open_tracker, sync, tell_about
from pipeline.config.load import load_config, parse_config
from pipeline.config.sections import METRICS, Config
from pipeline.data.labels import Category, LabelMap
from pipeline.errors import TrackingError, UserError
from pipeline.evaluate.results import weights_digest
from pipeline.files import write_json
from pipeline.registry.parent import VERSION_FILE
from pipeline.tracking.provenance import user
from pipeline.tracking.tracker import Tracker
from tests.builders import make_manifest, make_varied_manifest, write_checkpoint
from tests.jobs.test_cli import raydetr

LABELS = LabelMap("contiguous", (Category(1, "cat"),))
AWAY = "http://somebody:hunter2@127.0.0.1:9"


def make_config(runs: Path, uri: str, **sections: Any) -> Config:
    tracking = {"uri": uri, "patience": 0, "experiment": "track"}
    return parse_config({"name": "run", "runs": str(runs), "tracking": tracking, **sections}, "test")


class TestSync:
    def test_uploads_what_waits(self, mlflow_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tracker = open_tracker(make_config(tmp_path, AWAY))
        tracker.log_params({"a": 1})
        tracker.finish()
        with pytest.raises(TrackingError, match="2 uploads wait"):
            sync(make_config(tmp_path, AWAY))
        sync(make_config(tmp_path, mlflow_uri))
        sync(make_config(tmp_path, mlflow_uri))
        said = capsys.readouterr().out.splitlines()
        assert said[0] == "track sync: 2 uploads"
        assert said[2] == "track sync: already done, nothing waits"
        made = open_tracker(make_config(tmp_path, mlflow_uri))
        run = made.client.get_run(made.run_id)
        assert (run.info.status, run.data.params) == ("FINISHED", {"a": "1"})

    def test_a_trial_stands_below_its_sweep_once_that_has_a_run(self, mlflow_uri: str, tmp_path: Path) -> None:
        config = make_config(tmp_path, mlflow_uri)
        tracker, parent = open_tracker(config), config.model_copy(update={"name": "sweep"})
        parent.folder.path.mkdir()
        nest(tracker, "sweep")
        assert tracker.waiting() == 1
        run_id = open_tracker(parent).run_id
        sync(config)
        assert tracker.client.get_run(tracker.run_id).data.tags["mlflow.parentRunId"] == run_id

    def test_what_the_page_of_a_run_says(
        self, mlflow_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manifests = {"train": make_manifest(tmp_path / "train"), "val": make_manifest(tmp_path / "val")}
        config = make_config(
            tmp_path / "runs",
            mlflow_uri,
            dataset={"root": "data/<b> `cells`"},
            model={"with_box_refine": True, "two_stage": "mixed", "look_forward_twice": True},
            train={"global_batch": 2, "micro_batch": 2, "epochs": 3, "init": {"weights": "models:/cells@champion"}},
        )
        write_json(config.folder.parent / VERSION_FILE, {"version": "models:/cells/3"})
        monkeypatch.setattr("sys.argv", ["raydetr", "run", "--set", f"tracking.uri={AWAY}"])
        tracker = open_tracker(config)
        for _ in range(2):
            tell_about(tracker, config, manifests)
        assert tracker.sync()
        run = tracker.client.get_run(tracker.run_id)
        note = run.data.tags["mlflow.note.content"]
        parts = "iterative box refinement, look forward twice, two-stage with mixed queries"
        kind = f"**Deformable DETR** (resnet50, {parts}, 300 queries)"
        counted = f"{len(manifests['train'].samples)} images, 3 categories, from `models:/cells@champion`."
        assert note.startswith(f"{kind} on `<b> cells`: {counted}")
        assert "5 steps of 2 images (3.33 epochs)" in note
        assert run.data.tags["mlflow.source.name"].startswith("raydetr run --set ")
        assert "hunter2" not in str(run.data.tags)
        assert run.data.tags["mlflow.user"] == user()
        assert run.data.tags["raydetr.parent"] == "models:/cells/3"
        found = {(each.tags[0].value, each.dataset.digest) for each in run.inputs.dataset_inputs}
        contexts = {"train": "training", "val": "validation"}
        assert found == {(contexts[split], manifest.digest[:36]) for split, manifest in manifests.items()}
        assert len(run.inputs.dataset_inputs) == 2
        (file,) = tracker.client.list_artifacts(tracker.run_id)
        kept = Path(tracker.client.download_artifacts(tracker.run_id, file.path, str(tmp_path)))
        assert (kept.name, load_config(kept)) == ("config.yaml", config)

    def test_the_command(self, tmp_path: Path) -> None:
        file = tmp_path / "my.yaml"
        file.write_text(f"name: run\nruns: {tmp_path}\ntracking: {{uri: '{AWAY}'}}\n")
        nothing = raydetr("track", "sync", "-c", str(file))
        assert (nothing.returncode, nothing.stderr.count("\n")) == (2, 1)
        open_tracker(make_config(tmp_path, AWAY)).log_params({"a": 1})
        away = raydetr("track", "sync", "-c", str(file))
        assert away.returncode == 3
        assert "the work is done, and 1 uploads wait in" in away.stderr.splitlines()[-1]
        assert "Traceback" not in away.stderr
        assert "hunter2" not in away.stdout + away.stderr
        assert not [
            each for each in (tmp_path / "run").rglob("*") if each.is_file() and b"hunter2" in each.read_bytes()
        ]

    def test_a_server_that_is_required(self, tmp_path: Path) -> None:
        config = make_config(tmp_path, AWAY, tracking={"uri": AWAY, "required": True})
        with pytest.raises(UserError, match=r"tracking\.uri http://127\.0\.0\.1:9: .*tracking\.required"):
            open_tracker(config)


class TestPipelineEnds:
    @pytest.fixture
    def pipeline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> running.Pipeline:
        """One that needs no Ray."""
        from contextlib import nullcontext

        monkeypatch.setattr(running, "connected", lambda cluster: nullcontext())
        return running.Pipeline(make_config(tmp_path, AWAY))

    def test_uploads_that_wait(self, pipeline: running.Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
        config, done = pipeline.config, {"evaluate": dict.fromkeys(METRICS, 0.5), "register": None}
        with pytest.raises(TrackingError, match="the work is done"), pipeline:
            running.print_summary(pipeline.console, config, done, pipeline.tracker)
        assert not config.folder.lock.exists()
        lines = capsys.readouterr().out.splitlines()
        assert f"registered   waits in {config.folder.outbox}" in lines
        assert lines[-1] == "MLflow page  http://127.0.0.1:9"
        kinds = [json.loads(line)["kind"] for line in (config.folder.outbox / "operations.jsonl").open()]
        assert kinds == ["status", "params", "status"]

    def test_what_went_wrong_is_told_before_the_server(self, pipeline: running.Pipeline) -> None:
        with pipeline:
            assert pipeline.tracker.waiting() == 2
            pipeline.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
            pipeline._tracker = None
        last = (pipeline.config.folder.outbox / "operations.jsonl").read_text().splitlines()[-1]
        assert json.loads(last)["body"] == {"status": "FAILED"}

    def test_that_training_failed_is_told_last(
        self, pipeline: running.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Though a thread tells meanwhile that it is running."""
        split, start = make_varied_manifest(tmp_path / "split", 3), Tracker.start
        monkeypatch.setattr(pipeline, "_manifest", lambda name: split)
        monkeypatch.setattr(Tracker, "start", lambda tracker: [time.sleep(0.5), start(tracker)])
        monkeypatch.setattr(running, "RunMetrics", lambda name: None)
        monkeypatch.setattr(pipeline, "_evaluation_beside", lambda val, train: 1 / 0)
        with pytest.raises(ZeroDivisionError), pipeline:
            pipeline.train()
        for thread in threading.enumerate():
            if thread.name == "tracking":
                thread.join()
        operations = map(json.loads, (pipeline.config.folder.outbox / "operations.jsonl").read_text().splitlines())
        statuses = [operation["body"]["status"] for operation in operations if operation["kind"] == "status"]
        assert statuses == ["RUNNING", "FAILED"]


class TestWhich:
    @pytest.fixture
    def config(self, tmp_path: Path) -> Config:
        """A run with three scored checkpoints, the second of which is the best."""
        config = make_config(tmp_path, AWAY)
        for step, value in ((5, 0.2), (6, 0.9), (7, 0.5)):
            path = write_checkpoint(config.folder.checkpoints, LABELS, step=step, seed=step)
            metrics = dict.fromkeys(METRICS, value) | {"step": step}
            metrics["inputs"] = {"weights": weights_digest(path), "val_digest": "val", "settings": {}}
            for folder in (config.folder.evaluation / path.name, config.folder.evaluation):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "metrics.json").write_text(json.dumps(metrics))
        return config

    def best(self, config: Config) -> str:
        last = config.folder.checkpoints / "checkpoint-7"
        path, metrics = best_checkpoint(
            config, last, json.loads((config.folder.evaluation / "metrics.json").read_text())
        )
        assert path.name == f"checkpoint-{metrics['step']}"
        return path.name

    def test_the_best(self, config: Config) -> None:
        assert self.best(config) == "checkpoint-6"

    def test_the_best_that_is_there(self, config: Config) -> None:
        (config.folder.checkpoints / "checkpoint-6" / "state.json").unlink()
        assert self.best(config) == "checkpoint-7"

    def test_not_one_that_was_scored_on_other_data(self, config: Config) -> None:
        file = config.folder.evaluation / "checkpoint-6" / "metrics.json"
        file.write_text(file.read_text().replace('"val_digest": "val"', '"val_digest": "other"'))
        assert self.best(config) == "checkpoint-7"

    def test_not_other_weights_of_the_same_step(self, config: Config) -> None:
        (config.folder.checkpoints / "checkpoint-6" / "model.safetensors").write_bytes(b"others")
        assert self.best(config) == "checkpoint-7"
