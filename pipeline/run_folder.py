"""What lies where in a run's folder, `<runs>/<name>`."""

from dataclasses import dataclass
from pathlib import Path

METRICS_FILE = "metrics.json"
"""Name of the file of scores in a folder of results."""


@dataclass(frozen=True)
class RunFolder:
    """Everything of one run."""

    path: Path
    """The folder itself; Ray keeps its own bookkeeping of the run in `ray` below it."""

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def train_spool(self) -> Path:
        """File of the training curves."""
        return self.path / "spool" / "train.jsonl"

    @property
    def evaluate_spool(self) -> Path:
        """File of the points of evaluations."""
        return self.path / "spool" / "evaluate.jsonl"

    @property
    def evaluation(self) -> Path:
        """Folder of the scores, detections and pictures."""
        return self.path / "evaluate"

    def scores(self) -> dict[str, Path]:
        """Files of the scores, by the checkpoint's name."""
        return {file.parent.name: file for file in self.evaluation.glob(f"checkpoint-*/{METRICS_FILE}")}

    @property
    def mlflow_run(self) -> Path:
        """File that remembers the MLflow run."""
        return self.path / "mlflow_run.json"

    @property
    def outbox(self) -> Path:
        """Folder of what waits for the tracking server."""
        return self.path / "outbox"

    @property
    def stop(self) -> Path:
        """File that asks training to end in order."""
        return self.path / "stop"

    @property
    def profile(self) -> Path:
        """Folder of the traces of steps."""
        return self.path / "profile"

    @property
    def watch_log(self) -> Path:
        """File of what training's workers saw of each other."""
        return self.path / "watch.log"

    @property
    def stacks(self) -> Path:
        """Folder of where each rank's threads stood when training was lost."""
        return self.path / "stacks"

    @property
    def lock(self) -> Path:
        """File that whoever works on the run holds locked."""
        return self.path / "lock"

    def __str__(self) -> str:
        return str(self.path)
