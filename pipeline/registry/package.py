"""A detector as a pyfunc model "from code": the files that a version of a registered model carries.

The entry `entry.py`, the packages `model` and `pipeline` beside it as far as they answer, weights as safetensors and
settings as JSON; nothing is pickled.
"""

import importlib.metadata
import io
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

import model
import pipeline
from pipeline.checkpoint.state import State
from pipeline.config.sections import METRICS
from pipeline.predict.detector import Detector
from pipeline.registry.versions import VAL_TAG
from pipeline.tracking.tracker import Tracker

REQUIREMENTS = (
    "mlflow",
    "torch",
    "numpy",
    "scipy",
    "safetensors",
    "pillow",
    "opencv-python-headless",
    "simplejpeg",
    "pydantic",
    "pyyaml",
    "pandas",
)
"""Distributions that a registered model needs; they are pinned to the versions here."""

SERVED = (
    "errors.py",
    "log.py",
    "files.py",
    "run_folder.py",
    "config/sections.py",
    "config/keys.py",
    "config/values.py",
    "data/labels.py",
    "data/images.py",
    "data/augment.py",
    "checkpoint/state.py",
    "predict/detector.py",
)
"""The files of `pipeline` that a registered model carries: `predict/detector.py` and all that it imports."""


def write_model(detector: Detector, folder: Path, card: Any) -> None:
    """Write the files of a pyfunc model.

    Args:
        detector: what is served.
        folder: must not exist yet.
        card: the `mlflow.models.Model` to fill in.
    """
    import pandas  # type: ignore[import-untyped]
    from mlflow.models import ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema([ParamSpec("score_threshold", DataType.double, 0.0)]),
    )
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        draft = Path(temporary)
        detector.save(draft / "detector")
        _copy_code(draft / "raydetr")
        warnings.filterwarnings("ignore", ".*Add type hints", UserWarning)
        save_model(
            folder,
            python_model=str(Path(__file__).with_name("entry.py")),
            artifacts={"detector": str(draft / "detector")},
            code_paths=[str(draft / "raydetr")],
            signature=signature,
            input_example=(pandas.DataFrame({"image": [_example_picture()]}), {"score_threshold": 0.4}),
            pip_requirements=requirements(),
            mlflow_model=card,
        )


def requirements() -> list[str]:
    """Return the pinned requirements of a registered model; a local build of a version counts as the version."""
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in REQUIREMENTS]


def _example_picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (120, 130, 110)).save(buffer, "PNG")
    return buffer.getvalue()


def log_model(
    tracker: Tracker,
    folder: Path,
    detector: Detector,
    state: State,
    metrics: Mapping[str, Any],
    val_digest: str,
    config: Mapping[str, Any],
) -> str:
    """Write the model's files into `folder` and upload them as a logged model of the run; returns its id."""
    from mlflow.entities import LoggedModelOutput, Metric
    from mlflow.models import Model

    client = tracker.client
    numbers = {name: float(metrics[name]) for name in METRICS}
    experiment_id = client.get_run(tracker.run_id).info.experiment_id
    logged = client.create_logged_model(
        experiment_id,
        name="detector",
        source_run_id=tracker.run_id,
        tags={VAL_TAG: val_digest, "raydetr.data_digest": state.data_digest},
        params={"step": str(state.step)},
        model_type="object-detector",
    )
    metadata = {
        "config": dict(config),
        "label_map": state.labels,
        "data_digest": state.data_digest,
        "val_digest": val_digest,
        "metrics": numbers,
        "step": state.step,
        "source_run": tracker.run_id,
    }
    card = Model(run_id=tracker.run_id, model_id=logged.model_id, metadata=metadata)
    write_model(detector, folder / "model", card)
    client.log_model_artifacts(logged.model_id, str(folder / "model"))
    now = round(time.time() * 1000)
    own = [
        Metric(name, value, now, state.step, logged.model_id, "val", val_digest[:36]) for name, value in numbers.items()
    ]
    client.log_batch(tracker.run_id, metrics=own)
    client.log_outputs(tracker.run_id, [LoggedModelOutput(logged.model_id, state.step)])
    client.finalize_logged_model(logged.model_id, "READY")
    return str(logged.model_id)


def _copy_code(folder: Path) -> None:
    """Copy what answers: `model` whole, and of `pipeline` the files of `SERVED`, under empty faces."""
    shutil.copytree(_folder(model), folder / "model", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in SERVED:
        target = folder / "pipeline" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_folder(pipeline) / name, target)
        for package in target.relative_to(folder).parents[:-1]:
            (folder / package / "__init__.py").touch()


def _folder(package: ModuleType) -> Path:
    return Path(next(iter(package.__path__)))
