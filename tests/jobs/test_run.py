"""The pipeline: what it refuses before it begins, and what it shows while it trains."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from jobs.run import TrainingProgress, run_pipeline
from pipeline.config.sections import Config
from pipeline.errors import UserError
from pipeline.tracking.spool import Spool


@pytest.mark.parametrize("key", ["backbone", "weights"])
def test_initial_weights_that_are_not_there_are_told_at_once(key: str, tmp_path: Path) -> None:
    config = Config.model_validate({"name": "run", "runs": str(tmp_path), "train": {"init": {key: "none.pth"}}})
    with pytest.raises(UserError, match=rf"train\.init\.{key}: none\.pth: there is no such file or folder"):
        run_pipeline(config)
    assert not list(tmp_path.iterdir())


def test_a_registered_version_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            "name": "run",
            "runs": str(tmp_path / "runs"),
            "tracking": {"uri": f"sqlite:///{tmp_path}/none.db"},
            "train": {"init": {"weights": "models:/cells@champion"}},
        }
    )
    with pytest.raises(UserError, match=r"train\.init\.weights: there is no registry at"):
        run_pipeline(config)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


class TestSomeSteps:
    def test_they_must_be_in_order(self, tmp_path: Path) -> None:
        config = Config.model_validate({"name": "run", "runs": str(tmp_path)})
        with pytest.raises(UserError, match=r"--from evaluate --until train: the steps are shard, train, evaluate"):
            run_pipeline(config, first="evaluate", last="train")
        assert not list(tmp_path.iterdir())

    def test_what_is_not_there_is_told(self, tmp_path: Path) -> None:
        config = Config.model_validate({"name": "run", "runs": str(tmp_path)})
        with pytest.raises(UserError, match=r"there is no whole checkpoint to use; train first with `raydetr train`"):
            run_pipeline(config, first="register")


class TestTrainingProgress:
    def test_the_first_and_the_last_point_are_shown(self, tmp_path: Path) -> None:
        console = Console(file=io.StringIO(), width=100, force_terminal=False)
        with Spool(tmp_path / "spool") as spool, TrainingProgress(console, tmp_path / "spool", 8) as shown:
            shown.update()
            for step in range(1, 9):
                spool.write(step, {"train/epoch": step / 4, "train/loss": 1 / step, "train/images_per_second": 9.5})
                if step in (2, 5):
                    shown.update()
        assert isinstance(console.file, io.StringIO)
        assert console.file.getvalue().splitlines() == [
            "train: step 2/8  epoch 0.50  loss 0.500  9.5 images/s",
            "train: step 8/8  epoch 2.00  loss 0.125  9.5 images/s",
        ]

    def test_points_of_before_are_not_shown(self, tmp_path: Path) -> None:
        with Spool(tmp_path / "spool") as spool:
            spool.write(1, {"train/loss": 2.0})
        console = Console(file=io.StringIO(), width=100, force_terminal=False)
        with TrainingProgress(console, tmp_path / "spool", 8):
            pass
        assert isinstance(console.file, io.StringIO)
        assert console.file.getvalue() == ""
