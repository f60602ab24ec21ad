"""A detector as a pyfunc model "from code": the files that a version of a registered model carries.

The entry `entry.py`, the packages `model` and `pipeline` beside it as far as they answer, weights as safetensors and
settings as JSON; nothing is pickled.
"""

import importlib.metadata
import io
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

import model
import pipeline
from pipeline.config.sections import EvaluateSection
from pipeline.predict.answers import THRESHOLD
from pipeline.predict.detector import Detector
from pipeline.registry.gate import VAL_TAG
from pipeline.registry.versions import KEY_TAG
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
    "store.py",
    "run_folder.py",
    "config/sections.py",
    "config/deepspeed.py",
    "config/address.py",
    "config/keys.py",
    "config/values.py",
    "data/labels.py",
    "data/images.py",
    "data/augment.py",
    "data/philox.py",
    "checkpoint/state.py",
    "predict/detector.py",
    "predict/answers.py",
)
"""The files of `pipeline` that a registered model carries: `predict/answers.py` and all that it imports."""


def write_model(detector: Detector, folder: Path, card: Any) -> None:
    """Write the files of a pyfunc model.

    Args:
        detector: what is served.
        folder: must not exist yet.
        card: the `mlflow.models.Model` to fill in.
    """
    import pandas  # type: ignore[import-untyped]
    from mlflow.pyfunc import save_model

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
            signature=_signature(),
            input_example=(pandas.DataFrame({"image": [_example_picture()]}), {"score_threshold": THRESHOLD}),
            pip_requirements=requirements(),
            mlflow_model=card,
        )


def _signature() -> Any:
    """MLflow's schema of what goes in and out; a picture has several forms, of which base64 alone is text."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType, Array, Object, Property

    of_detection = {
        "category_id": DataType.long,
        "category": DataType.string,
        "score": DataType.double,
        "bbox": Array(DataType.double),
    }
    detection = Object([Property(name, kind) for name, kind in of_detection.items()])
    return ModelSignature(
        inputs=Schema([ColSpec(AnyType(), "image")]),
        outputs=Schema([ColSpec(Array(detection), "detections"), ColSpec(DataType.string, "error", required=False)]),
        params=ParamSchema([ParamSpec("score_threshold", DataType.double, THRESHOLD)]),
    )


def requirements() -> list[str]:
    """Return the pinned requirements of a registered model; a local build of a version counts as the version."""
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in REQUIREMENTS]


def _example_picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (120, 130, 110)).save(buffer, "PNG")
    return buffer.getvalue()


def log_model(
    tracker: Tracker, key: str, checkpoint: Path, evaluate: EvaluateSection, metadata: Mapping[str, Any]
) -> str:
    """Upload a checkpoint as a logged model of the run, unless it has this one; one that was begun is completed.

    Args:
        tracker: the run.
        key: digest of what the model is made of, by which it is found again.
        checkpoint: folder of the checkpoint.
        evaluate: sizes which it serves with.
        metadata: what the model is to say about itself; its "step", "val_digest" and "data_digest" are shown, too.

    Returns:
        The id of the logged model.

    Raises:
        UserError: the checkpoint is gone, or damaged.
        Exception: one of `server_errors`.
    """
    from mlflow.models import Model

    client = tracker.client
    found = own_models(tracker, key)
    logged = found[0] if found else _begin_model(tracker, key, metadata)
    if str(logged.status) == "READY":
        return str(logged.model_id)
    with tempfile.TemporaryDirectory() as folder:
        card = Model(run_id=tracker.run_id, model_id=logged.model_id, metadata=dict(metadata))
        write_model(Detector.from_checkpoint(checkpoint, evaluate), Path(folder) / "model", card)
        client.log_model_artifacts(logged.model_id, str(Path(folder) / "model"))
    client.finalize_logged_model(logged.model_id, "READY")
    return str(logged.model_id)


def own_models(tracker: Tracker, key: str) -> list[Any]:
    """The logged models that a run has made of what has a key, oldest first."""
    experiment_id = tracker.client.get_run(tracker.run_id).info.experiment_id
    found = tracker.client.search_logged_models([experiment_id], f"tags.`{KEY_TAG}` = '{key}'")
    own = [model for model in found if model.source_run_id == tracker.run_id]
    return sorted(own, key=lambda model: (model.creation_timestamp, model.model_id))


def _begin_model(tracker: Tracker, key: str, metadata: Mapping[str, Any]) -> Any:
    return tracker.client.create_logged_model(
        tracker.client.get_run(tracker.run_id).info.experiment_id,
        name="detector",
        source_run_id=tracker.run_id,
        tags={KEY_TAG: key, VAL_TAG: metadata["val_digest"], "raydetr.data_digest": metadata["data_digest"]},
        params={"step": str(metadata["step"])},
        model_type="object-detector",
    )


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
