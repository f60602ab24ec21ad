"""The register job, with a real MLflow."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.register import register
from jobs.track import make_version, sync
from pipeline.config.load import parse_config
from pipeline.config.sections import METRICS, Config
from pipeline.data.labels import Category, LabelMap
from pipeline.errors import UserError
from pipeline.evaluate.results import weights_digest
from pipeline.registry.register import VERSION
from pipeline.tracking.tracker import Tracker
from tests.builders import write_checkpoint

LABELS = LabelMap("contiguous", (Category(1, "cat"),))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    data: dict[str, Any] = {"name": "run", "runs": str(tmp_path), "register": {"model_name": tmp_path.name}}
    return parse_config(data, "test")


def write_metrics(config: Config, checkpoint: Path, value: float = 0.5) -> None:
    metrics = {name: value for name in METRICS} | {"per_category": {}, "step": 5}
    metrics["inputs"] = {"weights": weights_digest(checkpoint), "val_digest": "val"}
    (config.folder.evaluation).mkdir(parents=True, exist_ok=True)
    (config.folder.evaluation / "metrics.json").write_text(json.dumps(metrics))


def test_once(config: Config, mlflow_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(config.folder.checkpoints, LABELS)
    write_metrics(config, checkpoint)
    handlers = {VERSION: make_version}
    tracker = Tracker(mlflow_uri, "register", "run", config.folder.mlflow_run, handlers=handlers)
    first = register(config, checkpoint, tracker)
    assert (first.name, first.version, first.is_champion) == (config.register_.model_name, 1, True)
    assert "version 1" in capsys.readouterr().out
    second = register(config, checkpoint, tracker)
    assert (second.version, second.is_new) == (1, False)
    assert "register: already done" in capsys.readouterr().out


def test_one_that_had_to_wait_is_told_when_it_is_made(
    config: Config, mlflow_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(config.folder.checkpoints, LABELS)
    write_metrics(config, checkpoint)
    away = Tracker("http://127.0.0.1:9", "register", "run", config.folder.mlflow_run)
    assert register(config, checkpoint, away) is None
    assert capsys.readouterr().out == ""
    uri = {"uri": mlflow_uri, "experiment": "register"}
    sync(config.model_copy(update={"tracking": config.tracking.model_copy(update=uri)}))
    assert f"register: {config.register_.model_name} version 1  checkpoint-5  (" in capsys.readouterr().out


def test_needs_metrics_of_this_checkpoint(config: Config, mlflow_uri: str) -> None:
    checkpoint = write_checkpoint(config.folder.checkpoints, LABELS)
    tracker = Tracker(mlflow_uri, "register", "run", config.folder.mlflow_run)
    with pytest.raises(UserError, match=r"metrics\.json: .*has no metrics; score it first"):
        register(config, checkpoint, tracker)
    write_metrics(config, write_checkpoint(config.folder.checkpoints, LABELS, step=6, seed=1))
    with pytest.raises(UserError, match=r"not the metrics of .*checkpoint-5"):
        register(config, checkpoint, tracker)
