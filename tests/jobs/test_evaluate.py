"""The evaluation job on a real Ray, with a real MLflow."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from jobs.cluster import connected
from jobs.evaluate import evaluate, evaluate_weights, tell_scores
from jobs.report import report
from pipeline.checkpoint.state import read_state
from pipeline.config.load import parse_config
from pipeline.config.sections import METRICS, Config
from pipeline.data.loader import eval_batches
from pipeline.data.manifest import Manifest
from pipeline.data.truth import ground_truth
from pipeline.errors import UserError
from pipeline.evaluate.detect import detect
from pipeline.evaluate.score import score
from pipeline.predict.detector import Detector
from pipeline.run_folder import RunFolder
from pipeline.tracking.spool import Spool, SpoolReader
from pipeline.tracking.tracker import Tracker
from tests.builders import make_manifest, make_varied_manifest, write_checkpoint
from tests.pipeline.evaluate.pages import read_page

SIZES = {"batch_size": 2, "short_side": 48, "max_side": 64, "max_detections": 10, "pictures": 2}


def make_config(runs: Path, **evaluate: object) -> Config:
    data = {
        "name": "run",
        "runs": str(runs),
        "evaluate": {**SIZES, **evaluate},
        "train": {"global_batch": 4, "micro_batch": 2},
        "cluster": {"workers": 2, "device": "cpu", "cpus_per_worker": 0.5},
    }
    return parse_config(data, "test")


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    with connected(make_config(Path("runs")).cluster):
        yield


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_varied_manifest(tmp_path_factory.mktemp("split"), 7)


@pytest.fixture
def run(split: Manifest, tmp_path: Path) -> Path:
    """A run's folder with two checkpoints."""
    for step in (5, 10):
        write_checkpoint(tmp_path / "run" / "checkpoints", split.labels, step, seed=step)
    return tmp_path / "run"


@pytest.mark.usefixtures("ray_here")
class TestEvaluate:
    def test_equals_one_process(
        self, split: Manifest, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = make_config(run.parent)
        last = run / "checkpoints" / "checkpoint-10"
        metrics = evaluate(config, last, split, None)
        expected = detect(last, split, eval_batches(split, 2), config.evaluate, "cpu")
        assert json.loads((run / "evaluate" / "detections.json").read_text()) == expected
        assert score(ground_truth(split), expected).items() <= metrics.items()
        assert json.loads((run / "evaluate" / "metrics.json").read_text()) == metrics
        assert len(list((run / "evaluate" / "pictures").iterdir())) == 2
        assert {path.name for path in (run / "evaluate").iterdir() if path.suffix in (".csv", ".png")} == {
            "per_category.csv",
            "per_category.png",
        }
        assert f"evaluate: checkpoint-10  AP {metrics['AP']:.4f}" in capsys.readouterr().out

        written, reported = ((run / "evaluate" / name).stat().st_mtime_ns for name in ("metrics.json", "report.html"))
        elsewhere = make_config(run.parent, device="cuda")  # which is not there, and not needed
        assert evaluate(elsewhere, last, split, None) == metrics
        assert (run / "evaluate" / "report.html").stat().st_mtime_ns == reported
        page = read_page(run / "evaluate" / "report.html")
        shown = {row[0]: row[2] for row in page.section("numbers").rows()[1:]}
        assert shown == {name: f"{metrics[name]:.4f}" if metrics[name] >= 0 else "-" for name in METRICS}
        assert report(run, tmp_path / "again.html").read_bytes() == (run / "evaluate" / "report.html").read_bytes()
        assert "already done, checkpoint-10" in capsys.readouterr().out
        assert (run / "evaluate" / "metrics.json").stat().st_mtime_ns == written

    def test_curve_and_uploads(self, split: Manifest, run: Path, mlflow_uri: str) -> None:
        config = make_config(run.parent, curve=True)
        tracker = Tracker(mlflow_uri, "evaluation", "run", run / "mlflow_run.json")
        metrics = evaluate(config, run / "checkpoints" / "checkpoint-10", split, tracker)
        evaluate(config, run / "checkpoints" / "checkpoint-10", split, tracker)
        assert metrics["step"] == 10
        history = tracker.client.get_metric_history(tracker.run_id, "val/AP50")
        assert sorted(point.step for point in history) == [5, 10]
        before = json.loads((run / "evaluate" / "checkpoint-5" / "metrics.json").read_text())
        assert (metrics["verified"], before["verified"]) == (True, False)
        assert "baseline/AP" in tracker.client.get_run(tracker.run_id).data.metrics
        assert any(name.startswith("val_category/AP/") for name in tracker.client.get_run(tracker.run_id).data.metrics)
        files = {file.path for file in tracker.client.list_artifacts(tracker.run_id, "evaluate")}
        wanted = {"metrics.json", "detections.json", "report.html", "per_category.csv", "per_category.png", "pictures"}
        assert files == {f"evaluate/{name}" for name in wanted}
        assert len(tracker.client.list_artifacts(tracker.run_id, "evaluate/pictures")) == 2

    def test_what_is_no_better_than_a_constant_box_is_told(
        self, split: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        told = []
        for name, factor in (("blind", 1.0), ("seeing", 0.5)):
            metrics = {"step": 5, "AP": 0.2, "AP50": 0.4, "per_category": {}, "baseline": {"AP": 0.2 * factor}}
            metrics |= dict.fromkeys(METRICS, 0.2)
            caplog.clear()
            with caplog.at_level("WARNING", logger="raydetr"):
                tell_scores(RunFolder(tmp_path), name, metrics)
            told.append(caplog.text)
        assert "blind is no better than one constant box a category for every image, which has AP 0.2000" in told[0]
        assert not told[1]

    @pytest.mark.parametrize(
        ("score", "variety", "last", "message"),
        [
            (0.3, 0.1, 5.0, "gives nearly the same box for every image: its best boxes vary 0.10 times as much"),
            (0.3, 0.3, 9.9, "x is flat: it fell by 1.0 % from the first half"),
            (0.3, 0.3, 5.0, ""),
            (0.5, 0.3, 9.9, ""),
            (0.5, None, 9.9, ""),
        ],
        ids=["same box", "flat loss", "neither", "flat at a good score", "few images"],
    )
    def test_what_has_not_learned_is_told(
        self,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        score: float,
        variety: float | None,
        last: float,
        message: str,
    ) -> None:
        run = RunFolder(tmp_path)
        with Spool(run.train_spool) as spool:
            for step in range(30):
                spool.write(step, {"train/loss": 10.0 if step < 20 else last, "train/lr_main": float(step >= 10)})
        metrics = {"step": 5, "per_category": {}, "baseline": {"AP": 0.2}, "box_variety": variety}
        with caplog.at_level("WARNING", logger="raydetr"):
            tell_scores(run, "x", {**dict.fromkeys(METRICS, 0.2), **metrics, "AP": score})
        assert message in caplog.text
        assert bool(message) == bool(caplog.text)

    def test_what_is_learned_by_heart_is_told(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        for known, told in ((0.7, True), (0.6, False)):
            metrics = {"step": 5, "per_category": {}, "train_sample": {"AP": known, "AP50": 0.9, "images": 40}}
            caplog.clear()
            with caplog.at_level("WARNING", logger="raydetr"):
                tell_scores(RunFolder(tmp_path), "x", {**dict.fromkeys(METRICS, 0.4), **metrics})
            assert ("AP 0.7000 on 40 of them, 0.4000 on validation" in caplog.text) == told
        (point,) = SpoolReader(RunFolder(tmp_path).evaluate_spool).read()
        assert point.metrics["train_sample/AP"] == 0.7

    def test_a_file_of_weights(self, split: Manifest, run: Path, tmp_path: Path) -> None:
        """That of a checkpoint has the checkpoint's score, and leaves a folder that `predict` takes."""
        last, out = run / "checkpoints" / "checkpoint-10", tmp_path / "out"
        architecture = read_state(last).detr_config()
        config = make_config(run.parent).model_copy(update={"model": architecture})
        metrics = evaluate_weights(config, last, split, out)
        expected = evaluate(make_config(run.parent), last, split, None)
        assert {name: metrics[name] for name in METRICS} == {name: expected[name] for name in METRICS}
        assert {path.name for path in out.iterdir()} >= {"metrics.json", "detections.json", "pictures", "detector"}
        assert Detector.load(out / "detector").labels == split.labels
        with pytest.raises(UserError, match=r"none\.pth: there is no such weights file"):
            evaluate_weights(config, tmp_path / "none.pth", split, tmp_path / "other")
        other = config.model_copy(update={"model": replace(architecture, num_queries=9)})
        with pytest.raises(UserError, match=r"query_embed\.weight is \[8, 64\]"):
            evaluate_weights(other, last, split, tmp_path / "other")
        coco = make_manifest(tmp_path / "coco", labels="coco91")
        with pytest.raises(UserError, match=r"of 3 classes, and the data has 91 \(dataset\.labels: coco91\)"):
            evaluate_weights(config, last, coco, tmp_path / "other")
        assert not (tmp_path / "other").exists()

    def test_other_settings_are_refused(self, split: Manifest, run: Path) -> None:
        last = run / "checkpoints" / "checkpoint-10"
        evaluate(make_config(run.parent), last, split, None)
        with pytest.raises(UserError, match="short_side: 48 -> 32"):
            evaluate(make_config(run.parent, short_side=32), last, split, None)

    def test_a_users_error_in_a_task_is_one_line(self, split: Manifest, run: Path) -> None:
        last = run / "checkpoints" / "checkpoint-10"
        save_file({}, last / "model.safetensors")
        with pytest.raises(UserError, match="the weights are not those of its architecture") as caught:
            evaluate(make_config(run.parent), last, split, None)
        assert "Traceback" not in str(caught.value)
        assert not (run / "evaluate" / "metrics.json").exists()
