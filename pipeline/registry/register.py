"""Makes a scored checkpoint a version of a registered model in MLflow, and moves `@champion` when it is better.

A version is a pyfunc model "from code": a small entry file, the packages `model` and `pipeline` beside it, weights as
safetensors and settings as JSON; nothing is pickled. The entry imports the packages under the cover of a private path,
so that it works where the user has a `model.py` of their own:

    detector = mlflow.pyfunc.load_model("models:/raydetr@champion")
    detector.predict(pandas.DataFrame({"image": [Path("street.jpg").read_bytes()]}), params={"score_threshold": 0.4})
"""

import importlib.metadata
import io
import json
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

import model
import pipeline
from pipeline.checkpoint.save import State, read_state
from pipeline.config.sections import EvaluateSection, RegisterSection, digest
from pipeline.errors import UserError
from pipeline.evaluate.score import METRICS, weights_digest
from pipeline.log import get_logger
from pipeline.predict.detector import Detector
from pipeline.tracking.tracker import Tracker, use_server

logger = get_logger(__name__)

CHAMPION = "champion"
KEY_TAG = "raydetr.key"
VAL_TAG = "raydetr.val_digest"
METRIC_TAG = "raydetr.metric."
REQUIREMENTS = (
    "mlflow",
    "torch",
    "numpy",
    "scipy",
    "safetensors",
    "pillow",
    "opencv-python-headless",
    "pydantic",
    "pyyaml",
    "pandas",
)
"""Distributions that a registered model needs; they are pinned to the versions here."""

ENTRY = '''"""Entry of a registered raydetr detector: encoded pictures in, JSON lists of detections out."""

import sys
from pathlib import Path

import pandas
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

CODE = Path(__file__).resolve().parent / "code" / "raydetr"


def import_serving():
    """Import this version's own code, whatever other `model` and `pipeline` there are, and leave those as they were."""

    def packages():
        return [name for name in sys.modules if name.split(".")[0] in ("model", "pipeline")]

    aside = {name: sys.modules.pop(name) for name in packages()}
    sys.path.insert(0, str(CODE))
    try:
        from pipeline.predict import detector as serving
    finally:
        sys.path.remove(str(CODE))
        for name in packages():
            del sys.modules[name]
        sys.modules.update(aside)
    return serving


class RegisteredDetector(PythonModel):
    def load_context(self, context):
        self.serving = import_serving()
        self.detector = self.serving.Detector.load(Path(context.artifacts["detector"]))

    def predict(self, context, model_input: pandas.DataFrame, params=None):
        threshold = (params or {}).get("score_threshold", 0.0)
        return self.serving.answer(self.detector, list(model_input["image"]), threshold)


set_model(RegisteredDetector())
'''


@dataclass(frozen=True)
class Registration:
    """A version of a registered model."""

    name: str
    """Registered model."""
    version: int
    """Number of the version."""
    is_champion: bool
    """Whether `@champion` is this version now."""
    is_new: bool
    """Whether the version was made by this call; False where the same was registered before."""
    note: str
    """Why `@champion` moved or stayed."""

    @property
    def uri(self) -> str:
        """Address for `mlflow.pyfunc.load_model` and `raydetr predict -m`."""
        return f"models:/{self.name}/{self.version}"


def register(
    tracker: Tracker,
    checkpoint: Path,
    metrics: Mapping[str, Any],
    val_digest: str,
    section: RegisterSection,
    evaluate: EvaluateSection,
    config: Mapping[str, Any],
) -> Registration:
    """Make a version of `section.model_name`, unless the same checkpoint with the same metrics is one already.

    Args:
        tracker: the MLflow run that the version comes from.
        checkpoint: folder of the checkpoint.
        metrics: what `pipeline.evaluate.score` gave for it.
        val_digest: digest of the manifest that it was scored on.
        section: name of the model, and the metric that decides about `@champion`.
        evaluate: sizes at which it was scored, which it will serve with.
        config: whole configuration, kept with the version.

    Returns:
        The version, and what became of `@champion`.

    Raises:
        UserError: the metric is none of COCO's, or the registry refuses the name.
        TrackingError: the server is away.
    """
    if any(letter in section.model_name for letter in "/:'") or not section.model_name.strip():
        raise UserError(f"register.model_name {section.model_name!r}: must not be empty or hold / : or '")
    state = read_state(checkpoint)
    key = _key(checkpoint, state, metrics, val_digest, evaluate)
    with tracker.talking():
        use_server(tracker.uri)
        found = tracker.client.search_model_versions(f"name='{section.model_name}' and tags.`{KEY_TAG}`='{key}'")
        if found:
            version = int(found[0].version)
            champion = _champion(tracker, section.model_name)
            is_champion = champion is not None and int(champion.version) == version
            return Registration(section.model_name, version, is_champion, False, "registered before")
        with tempfile.TemporaryDirectory() as folder:
            detector = Detector.from_checkpoint(checkpoint, evaluate)
            model_id = _log_model(tracker, Path(folder), detector, state, metrics, val_digest, config)
        version = _make_version(tracker, section.model_name, model_id, _tags(key, state, metrics, val_digest))
        moves, note = _decide(_champion(tracker, section.model_name), metrics, val_digest, section.metric)
        if moves:
            tracker.client.set_registered_model_alias(section.model_name, CHAMPION, str(version))
        tracker.client.set_tag(tracker.run_id, "raydetr.registered", f"models:/{section.model_name}/{version}")
    return Registration(section.model_name, version, moves, True, note)


def _key(checkpoint: Path, state: State, metrics: Mapping[str, Any], val_digest: str, evaluate: EvaluateSection) -> str:
    """Digest of what a version is made of: weights, label map, sizes and metrics."""
    weights = weights_digest(checkpoint)
    sizes = [evaluate.short_side, evaluate.max_side, evaluate.max_detections]
    numbers = {name: metrics[name] for name in METRICS}
    return digest([weights, state.labels, state.config["model"], state.data_digest, val_digest, sizes, numbers])


def _tags(key: str, state: State, metrics: Mapping[str, Any], val_digest: str) -> dict[str, str]:
    numbers = {f"{METRIC_TAG}{name}": repr(float(metrics[name])) for name in METRICS}
    return {
        KEY_TAG: key,
        VAL_TAG: val_digest,
        "raydetr.data_digest": state.data_digest,
        "raydetr.step": str(state.step),
        **numbers,
    }


def _log_model(
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
        (draft / "detector_model.py").write_text(ENTRY, encoding="utf-8")
        detector.save(draft / "detector")
        for package in (model, pipeline):
            source = Path(next(iter(package.__path__)))
            shutil.copytree(
                source, draft / "raydetr" / source.name, ignore=shutil.ignore_patterns("__pycache__", "*.so")
            )
        warnings.filterwarnings("ignore", ".*Add type hints", UserWarning)
        save_model(
            folder,
            python_model=str(draft / "detector_model.py"),
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


def _make_version(tracker: Tracker, name: str, model_id: str, tags: dict[str, str]) -> int:
    from mlflow.exceptions import MlflowException

    try:
        tracker.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = tracker.client.create_model_version(
        name, f"models:/{model_id}", tracker.run_id, tags=tags, model_id=model_id
    )
    # The link from the logged model to its version on MLflow's pages, as `mlflow.register_model` sets it.
    link = json.dumps([{"name": name, "version": str(made.version)}])
    tracker.client.set_logged_model_tags(model_id, {"mlflow.modelVersions": link})
    return int(made.version)


def _champion(tracker: Tracker, name: str) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        return tracker.client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _decide(champion: Any | None, metrics: Mapping[str, Any], val_digest: str, metric: str) -> tuple[bool, str]:
    """Whether `@champion` moves, and why."""
    if float(metrics[metric]) < 0:
        return False, f"no champion: there is no object on the validation split that {metric} could be of"
    if champion is None:
        return True, "the first champion"
    number = f"version {champion.version}"
    if champion.tags.get(VAL_TAG) != val_digest:
        return False, (
            f"@champion stays {number}: it was scored on another validation split, so the two cannot be compared; "
            "score both on one split, or move the alias by hand"
        )
    try:
        old = float(champion.tags[f"{METRIC_TAG}{metric}"])
    except (KeyError, ValueError):
        return False, f"@champion stays {number}: its tags do not give its {metric}"
    new = float(metrics[metric])
    if math.isfinite(new) and new > old:
        return True, f"{metric} {new:.4f} is better than {old:.4f} of {number}"
    return False, f"@champion stays {number}: {metric} {new:.4f} is not better than its {old:.4f}"
