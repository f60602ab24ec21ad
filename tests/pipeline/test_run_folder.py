"""What lies where in a run's folder."""

from pathlib import Path

from pipeline.run_folder import RunFolder, run_folder
from pipeline.store import StorePath


def test_everything_has_its_place_below_the_folder() -> None:
    run = RunFolder(Path("runs/demo"))
    assert str(run) == "runs/demo"
    assert {
        name: str(getattr(run, name)) for name, value in vars(RunFolder).items() if isinstance(value, property)
    } == {
        "checkpoints": "runs/demo/checkpoints",
        "train_spool": "runs/demo/spool/train.jsonl",
        "evaluate_spool": "runs/demo/spool/evaluate.jsonl",
        "evaluation": "runs/demo/evaluate",
        "followed": "runs/demo/followed",
        "parent": "runs/demo/parent",
        "mlflow_run": "runs/demo/mlflow_run.json",
        "outbox": "runs/demo/outbox",
        "stop": "runs/demo/stop",
        "pruned": "runs/demo/pruned.json",
        "profile": "runs/demo/profile",
        "watch": "runs/demo/watch",
        "stacks": "runs/demo/stacks",
        "lock": "runs/demo/lock",
    }


def test_naming_it_makes_nothing(tmp_path: Path) -> None:
    assert not RunFolder(tmp_path / "demo").checkpoints.exists()
    assert not list(tmp_path.iterdir())


def test_scores_are_found_by_the_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.scores() == {}
    for name in ("checkpoint-5", "checkpoint-10", "other"):
        (run.evaluation / name).mkdir(parents=True)
    file = run.evaluation / "checkpoint-5" / "metrics.json"
    file.write_text("{}")
    assert run.scores() == {"checkpoint-5": file}
    part = run.results(20) / "checkpoint-10" / "metrics.json"
    part.parent.mkdir(parents=True)
    part.write_text("{}")
    assert (run.scores(), run.scores(20), run.scores(30)) == ({"checkpoint-5": file}, {"checkpoint-10": part}, {})


def test_a_run_in_a_store_has_a_copy_here(tmp_path: Path) -> None:
    assert run_folder(tmp_path, "demo") == RunFolder(tmp_path / "demo")
    runs = StorePath("s3://bucket/runs")
    run, other = run_folder(runs, "demo"), run_folder(StorePath("s3://other/runs"), "demo")
    assert str(run) == "s3://bucket/runs/demo"
    assert run.path.name == other.path.name == "demo"
    assert run.path != other.path
    assert str(run.place(run.checkpoints / "checkpoint-5")) == "s3://bucket/runs/demo/checkpoints/checkpoint-5"
    assert run.place(None) is None
    assert RunFolder(tmp_path).place(tmp_path / "stop") == tmp_path / "stop"
