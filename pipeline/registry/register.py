"""Makes a scored checkpoint a version of a registered model in MLflow, and moves `@champion` when it is better.

A version answers wherever MLflow is:

    detector = mlflow.pyfunc.load_model("models:/raydetr@champion")
    detector.predict(pandas.DataFrame({"image": [Path("street.jpg")]}), params={"score_threshold": 0.4})

A registration is an operation of the run's outbox. It may be cut after any request: each of its steps first looks
whether it was done, by the key of what is registered.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.checkpoint.state import STATE, State, read_state
from pipeline.config.sections import METRICS, EvaluateSection, GateSection, RegisterSection, Role, settings_with
from pipeline.config.values import digest, plain
from pipeline.evaluate.results import weights_digest
from pipeline.registry.aliases import CHAMPION, after_registration, record, settled
from pipeline.registry.description import description_of
from pipeline.registry.gate import METRIC_TAG, VAL_TAG, category_tags, decide
from pipeline.registry.lock import registry_lock
from pipeline.registry.package import log_model, own_models
from pipeline.registry.parent import PARENT_TAG
from pipeline.registry.versions import KEY_TAG, find_alias, find_version, make_version
from pipeline.tracking.outbox import Operation
from pipeline.tracking.provenance import code_version
from pipeline.tracking.server import use_server
from pipeline.tracking.tracker import Tracker

CHAMPION_TAG = "raydetr.champion"
"""Tag of a version with what was decided about `@champion` when it was made."""
UNDECIDED = "undecided"
VERSION = "version"
"""Kind of the operations of the outbox that make a version."""


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
    parent: str | None = None,
) -> Registration | None:
    """Make a version of `section.model_name`, unless the same checkpoint with the same metrics is one already.

    Args:
        tracker: the MLflow run that the version comes from.
        checkpoint: folder of the checkpoint.
        metrics: what `pipeline.evaluate.score` gave for it.
        val_digest: digest of the manifest that it was scored on.
        section: name of the model, and the metric that decides about `@champion`.
        evaluate: sizes at which it was scored, which it will serve with.
        config: whole configuration, kept with the version.
        parent: the version that training began with, `models:/NAME/VERSION`.

    Returns:
        The version, and what became of `@champion`; None where it waits in the outbox or was refused.

    Raises:
        UserError: the folder is no checkpoint.
    """
    state = read_state(checkpoint)
    numbers = {name: float(metrics[name]) for name in METRICS}
    key = _key(checkpoint, state, metrics, val_digest, evaluate)
    _keep(checkpoint, _kept(tracker, key))
    body = {
        "key": key,
        "checkpoint": tracker.outbox.reference(checkpoint),
        "evaluate": plain(evaluate),
        "metric": section.metric,
        "gate": plain(section.gate),
        "metadata": {
            "config": dict(config),
            "label_map": state.labels,
            "data_digest": state.data_digest,
            "val_digest": val_digest,
            "metrics": numbers,
            "baseline": {name: float(value) for name, value in metrics.get("baseline", {}).items()},
            "category_AP": {name: float(values["AP"]) for name, values in metrics["per_category"].items()},
            "step": state.step,
            "code": code_version(),
            **({"parent": parent} if parent else {}),
        },
    }
    tracker.handlers.setdefault(VERSION, register_version)
    registration: Registration | None = tracker.request(VERSION, section.model_name, body)
    return registration


def register_version(tracker: Tracker, operation: Operation) -> Registration:
    """Do an operation of the kind `VERSION`, from where it was cut.

    Raises:
        UserError: the checkpoint is gone.
        Exception: one of `server_errors`.
    """
    name, body = operation.subject, operation.body
    key, metadata = body["key"], {**body["metadata"], "source_run": tracker.run_id}
    use_server(tracker.uri)
    kept = _kept(tracker, key)
    checkpoint = kept if (kept / STATE).is_file() else tracker.outbox.path(body["checkpoint"])
    upload = partial(
        log_model, tracker, _model_key(operation), checkpoint, EvaluateSection(**body["evaluate"]), metadata
    )
    model_id = "" if find_version(tracker, name, key) else upload()  # which takes long: others need not wait for it
    with registry_lock(tracker.client, tracker.run_id, name):
        version = find_version(tracker, name, key)
        is_new = version is None
        if version is None:
            model_id = model_id or upload()
            text = description_of(name, model_id, metadata)
            number = make_version(tracker, name, model_id, _tags(key, metadata), text)
            version = tracker.client.get_model_version(name, str(number))
        gate = GateSection(**body.get("gate", {}))
        note = _settle_champion(tracker, name, version, metadata, body["metric"], gate)
        champion = find_alias(tracker.client, name, CHAMPION)
    is_champion = champion is not None and champion.version == version.version
    _link(tracker, operation, version)
    shutil.rmtree(kept, ignore_errors=True)
    return Registration(name, int(version.version), is_champion, is_new, note)


def _key(checkpoint: Path, state: State, metrics: Mapping[str, Any], val_digest: str, evaluate: EvaluateSection) -> str:
    """Digest of what a version is made of: weights, label map, sizes and metrics."""
    weights = weights_digest(checkpoint)
    sizes = [getattr(evaluate, name) for name in settings_with(EvaluateSection, Role.SERVES)]
    numbers = {name: metrics[name] for name in METRICS}
    return digest([weights, state.labels, state.config["model"], state.data_digest, val_digest, sizes, numbers])


def _model_key(operation: Operation) -> str:
    """Key of the logged model of a version: each registered model has its own."""
    return digest([operation.subject, operation.body["key"]])


def _kept(tracker: Tracker, key: str) -> Path:
    """Where the outbox keeps a checkpoint until its version is made, whatever becomes of the run's own."""
    return tracker.outbox.folder / "checkpoints" / key[:16]


def _keep(checkpoint: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in (read_state(checkpoint).weights, STATE):  # the state last, as in every checkpoint
        if not (folder / name).exists():
            try:
                os.link(checkpoint / name, folder / name)
            except OSError:  # another file system, or one without links
                shutil.copyfile(checkpoint / name, folder / f".{name}.tmp")
                (folder / f".{name}.tmp").replace(folder / name)


def _tags(key: str, metadata: Mapping[str, Any]) -> dict[str, str]:
    numbers = {f"{METRIC_TAG}{name}": repr(value) for name, value in metadata["metrics"].items()}
    return {
        KEY_TAG: key,
        CHAMPION_TAG: UNDECIDED,
        VAL_TAG: metadata["val_digest"],
        "raydetr.data_digest": metadata["data_digest"],
        "raydetr.step": str(metadata["step"]),
        **numbers,
        **({PARENT_TAG: metadata["parent"]} if "parent" in metadata else {}),
        **category_tags(metadata.get("category_AP", {})),
        **{f"raydetr.{name}": value for name, value in metadata.get("code", {}).items()},
    }


def _settle_champion(
    tracker: Tracker, name: str, version: Any, metadata: Mapping[str, Any], metric: str, gate: GateSection
) -> str:
    """Decide about `@champion`, once a version: afterwards whoever moves it by hand is right. Returns why."""
    if version.tags.get(CHAMPION_TAG, "") != UNDECIDED:
        return "registered before"
    client, number = tracker.client, str(version.version)
    now = settled(client, name)
    if now.champion == number:
        note = "completed what was begun before: it is the champion"
    else:
        moves, note = decide(find_alias(client, name, CHAMPION), now, metadata, metric, gate)
        aliases = after_registration(now, number, moves=moves)
        record(client, name, now, "register", aliases, f"version {number}: {note}", pins=now.pin is not None)
    client.set_model_version_tag(name, number, CHAMPION_TAG, note)
    return note


def _link(tracker: Tracker, operation: Operation, version: Any) -> None:
    """Show the version and its metrics on the run's page, the version on the logged model's; remove what is left over.

    The version may come from another run whose results are the same, and this run have begun a logged model, too.
    """
    from mlflow.entities import LoggedModelOutput, Metric

    client, run_id, model_id = tracker.client, tracker.run_id, version.source.removeprefix("models:/")
    metadata, when = operation.body["metadata"], round(operation.time * 1000)
    step, place = metadata["step"], ("val", metadata["val_digest"][:36])
    metrics = [Metric(name, value, when, step, model_id, *place) for name, value in metadata["metrics"].items()]
    run = client.get_run(run_id)
    if model_id not in [output.model_id for output in run.outputs.model_outputs]:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])
    if any(run.data.metrics.get(metric.key) != metric.value for metric in metrics):
        client.log_batch(run_id, metrics=metrics)
    client.set_tag(run_id, "raydetr.registered", f"models:/{version.name}/{version.version}")
    links = json.loads(client.get_logged_model(model_id).tags.get("mlflow.modelVersions", "[]"))
    link = {"name": version.name, "version": str(version.version)}
    if (version.name, str(version.version)) not in [(each["name"], str(each["version"])) for each in links]:
        # As `mlflow.register_model` and some servers set it.
        client.set_logged_model_tags(model_id, {"mlflow.modelVersions": json.dumps([*links, link])})
    for model in own_models(tracker, _model_key(operation)):
        if model.model_id != model_id and "mlflow.modelVersions" not in model.tags:
            client.delete_logged_model(model.model_id)
