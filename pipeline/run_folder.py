"""What lies where in a run's folder, `<runs>/<name>`."""

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.store import Place, StorePath

METRICS_FILE = "metrics.json"
"""Name of the file of scores in a folder of results."""
WEIGHTS = "model.safetensors"
"""Name of the file of weights in the folder of a detector."""


@dataclass(frozen=True)
class RunFolder:
    """Everything of one run."""

    path: Path
    """The folder itself, or this machine's copy of it; Ray keeps its own bookkeeping of the run in `ray` below it."""
    store: StorePath | None = None
    """Where the run lies whose copy this is; None where the folder is all there is."""

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

    def results(self, subset: int = 0) -> Path:
        """Folder of the folders of checkpoints' scores on so many images of the validation split; 0 for all."""
        return self.evaluation / f"subset-{subset}" if subset else self.evaluation

    def scores(self, subset: int = 0) -> dict[str, Path]:
        """Files of the scores, by the checkpoint's name; `subset` as of `results`."""
        return {file.parent.name: file for file in self.results(subset).glob(f"checkpoint-*/{METRICS_FILE}")}

    @property
    def followed(self) -> Path:
        """Folder of what a command that scores the run from elsewhere leaves for the one that works on it."""
        return self.path / "followed"

    @property
    def parent(self) -> Path:
        """Folder of the registered detector that training began with."""
        return self.path / "parent"

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
    def pruned(self) -> Path:
        """File that ends training for good: other trials of its sweep are better."""
        return self.path / "pruned.json"

    @property
    def profile(self) -> Path:
        """Folder of the traces of steps."""
        return self.path / "profile"

    @property
    def watch(self) -> Path:
        """Folder of what each rank saw of the others."""
        return self.path / "watch"

    @property
    def stacks(self) -> Path:
        """Folder of where each rank's threads stood when training was lost."""
        return self.path / "stacks"

    @property
    def lock(self) -> Path:
        """File that whoever works on the run holds locked."""
        return self.path / "lock"

    def place(self, path: Path | None) -> Place | None:
        """Where people find what lies in the folder."""
        if path is None or self.store is None:
            return path
        return self.store / path.relative_to(self.path).as_posix()

    def __str__(self) -> str:
        return str(self.store or self.path)


def copies_folder() -> Path:
    """Folder of this user's copies of the runs in stores."""
    return Path(tempfile.gettempdir()) / f"raydetr-runs-{os.getuid()}"


def run_folder(runs: Place, name: str) -> RunFolder:
    """The folder of a run below that of all runs; for runs in a store, this user's copy of it on this machine."""
    if isinstance(runs, Path):
        return RunFolder(runs / name)
    return RunFolder(copies_folder() / hashlib.sha256(str(runs).encode()).hexdigest()[:16] / name, runs / name)
