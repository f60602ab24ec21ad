"""Makes a scored checkpoint a version of a registered model in MLflow, and moves `@champion` when it is better.

A version answers wherever MLflow is:

    detector = mlflow.pyfunc.load_model("models:/raydetr@champion")
    detector.predict(pandas.DataFrame({"image": [Path("street.jpg").read_bytes()]}), params={"score_threshold": 0.4})
"""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.state import State, read_state
from pipeline.config.sections import METRICS, EvaluateSection, RegisterSection, Role, settings_with
from pipeline.config.values import digest
from pipeline.errors import UserError
from pipeline.evaluate.results import weights_digest
from pipeline.predict.detector import Detector
from pipeline.registry.package import log_model
from pipeline.registry.versions import CHAMPION, VAL_TAG, find_champion, make_version
from pipeline.tracking.server import use_server
from pipeline.tracking.tracker import Tracker

KEY_TAG = "raydetr.key"
METRIC_TAG = "raydetr.metric."


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
            champion = find_champion(tracker, section.model_name)
            is_champion = champion is not None and int(champion.version) == version
            return Registration(section.model_name, version, is_champion, False, "registered before")
        with tempfile.TemporaryDirectory() as folder:
            detector = Detector.from_checkpoint(checkpoint, evaluate)
            model_id = log_model(tracker, Path(folder), detector, state, metrics, val_digest, config)
        version = make_version(tracker, section.model_name, model_id, _tags(key, state, metrics, val_digest))
        moves, note = _decide(find_champion(tracker, section.model_name), metrics, val_digest, section.metric)
        if moves:
            tracker.client.set_registered_model_alias(section.model_name, CHAMPION, str(version))
        tracker.client.set_tag(tracker.run_id, "raydetr.registered", f"models:/{section.model_name}/{version}")
    return Registration(section.model_name, version, moves, True, note)


def _key(checkpoint: Path, state: State, metrics: Mapping[str, Any], val_digest: str, evaluate: EvaluateSection) -> str:
    """Digest of what a version is made of: weights, label map, sizes and metrics."""
    weights = weights_digest(checkpoint)
    sizes = [getattr(evaluate, name) for name in settings_with(EvaluateSection, Role.SERVES)]
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
