"""What lies where in a run's folder."""

from pathlib import Path

from pipeline.run_folder import RunFolder


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
        "mlflow_run": "runs/demo/mlflow_run.json",
        "outbox": "runs/demo/outbox",
        "stop": "runs/demo/stop",
        "lock": "runs/demo/lock",
    }


def test_naming_it_makes_nothing(tmp_path: Path) -> None:
    assert not RunFolder(tmp_path / "demo").checkpoints.exists()
    assert not list(tmp_path.iterdir())
