"""The MLflow run of a pipeline run: whatever it is to get goes into the outbox first, and is uploaded from there.

Training workers never talk to a server. Rank 0 appends points to a `Spool`; the driver holds a `Tracker`, which makes
the MLflow run (or continues the one named in its run file), and uploads the outbox and its spools in order. How far
that came is kept beside them, so a server that is away, or a driver that is killed, loses nothing and doubles nothing.

MLflow is imported by the first `Tracker`, not by this module: that import takes seconds.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.address import shown
from pipeline.config.values import digest, flatten
from pipeline.errors import TrackingError, UserError
from pipeline.files import write_json
from pipeline.log import get_logger
from pipeline.run_folder import RunFolder
from pipeline.tracking.outbox import Operation, Outbox
from pipeline.tracking.runs import FOLDER_TAG, RUN_TAG
from pipeline.tracking.server import (
    artifact_location,
    connect,
    error_code,
    first_line,
    is_refusal,
    page,
    server_errors,
    why,
)
from pipeline.tracking.spool import SpoolReader, SpoolRecord

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = get_logger(__name__)

BATCH = 1000
"""Most metrics of one upload: the limit of MLflow's log-batch call."""
PARAMS = 100
"""Most params of one upload: the limit of MLflow's log-batch call."""
RETRY_SECONDS = 15.0
"""Least time between two tries to reach a server that is away: a try can take as long as its time-out."""
PARAM_LENGTH = 6000
"""Most characters of a param's value that MLflow takes."""

Handler = Callable[["Tracker", Operation], Any]


class Tracker:
    """The MLflow run of a pipeline run, on the driver's side. One process at a time may hold it.

    Args:
        uri: tracking server, or `sqlite:////absolute/path.db`.
        experiment: name of the MLflow experiment, made when missing.
        run_name: name of the MLflow run.
        run_file: JSON file that remembers the run (`uri`, `experiment`, `run_id`): when it is there, and the uri is the
            same, the run is continued, else a new one is made. The outbox is beside it.
        where: people find the run, where that is not the folder of the run file.
        required: refuse a server that is away now, instead of making the run when it is back.
        reach: call `reach` at once.
        handlers: what operations of other kinds do, by kind.

    Raises:
        UserError: MLflow does not know such an address, the run file is broken, or the server is required and away.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        run_file: Path,
        *,
        where: str | None = None,
        required: bool = False,
        reach: bool = True,
        handlers: Mapping[str, Handler] | None = None,
    ) -> None:
        self.uri = shown(uri)
        self.outbox = Outbox(RunFolder(run_file.parent).outbox)
        self.run_id = ""
        """The MLflow run; empty until it could be reached or made."""
        self.handlers: dict[str, Handler] = {
            "params": Tracker._send_params,
            "points": lambda tracker, operation: None,  # spools are uploaded before all operations
            "tags": Tracker._send_tags,
            "dataset": Tracker._send_dataset,
            "artifacts": Tracker._send_artifacts,
            "status": Tracker._send_status,
            **(handlers or {}),
        }
        self._address, self._experiment, self._run_name, self._run_file = uri, experiment, run_name, run_file
        self._required, self._where = required, where
        self._experiment_id = ""
        self._client: MlflowClient | None = None
        self._lock = threading.Lock()
        self._is_away = self._is_killed = False
        self._stuck: set[str] = set()
        self._next_try = 0.0
        self._results: dict[str, Any] = {}
        self._recorded = _read_run_file(run_file)
        if reach:
            self.reach()

    @property
    def client(self) -> "MlflowClient":
        """MLflow's client of the server."""
        if self._client is None:
            self._client = connect(self._address)
        return self._client

    @property
    def page(self) -> str:
        """Where the run is seen, for people."""
        return page(self.uri, self._experiment_id, self.run_id)

    def start(self) -> None:
        """The run goes on: its status is RUNNING until `finish`, unless it has been killed by now."""
        with self._lock:
            if not self._is_killed:
                self.outbox.add("status", "", {"status": "RUNNING"})
        self.sync()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log settings, nested mappings by dotted keys. One that differs from the run's first start becomes a tag.

        MLflow's params cannot change, and a run may be continued with more epochs: the new value is the tag
        `continued.<key>`.
        """
        self._want("params", "", {key: str(value)[:PARAM_LENGTH] for key, value in flatten(params).items()})

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run; those of the last call count."""
        self._want("tags", "", dict(tags))

    def log_dataset(self, context: str, name: str, digest: str, source: str) -> None:
        """Name a dataset that the run uses, in a `context` such as training.

        Args:
            context: what it is used for.
            name: for people.
            digest: of its content; MLflow keeps 36 characters of it.
            source: where it lies.
        """
        self._want("dataset", context, {"name": name, "digest": digest[:36], "source": shown(source)})

    def log_points(self, spool: Path) -> None:
        """Upload the points of a spool from now on, with each `sync`."""
        self._want("points", self.outbox.reference(spool), {})

    def log_artifacts(self, path: Path, folder: str | None = None) -> None:
        """Upload a file, or all files of a folder, into `folder` of the run's artifacts, unless it has just these."""
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        state = digest([[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files])
        self._want("artifacts", self.outbox.reference(path), {"folder": folder, "state": state})

    def finish(self, status: str = "FINISHED") -> None:
        """End the run: FINISHED, FAILED or KILLED."""
        self._want("status", "", {"status": status})

    def kill(self) -> None:
        """End the run before anything else that waits is sent: this process may be killed at any moment.

        The run is KILLED, unless another end is wanted by now. For a thread of its own, while another one may be in any
        call of this tracker.
        """
        self._is_killed = True
        with self._lock:
            operation = self.outbox.last("status")
            if operation is None or operation.body["status"] == "RUNNING":
                operation = self.outbox.add("status", "", {"status": "KILLED"})
            if self._client is None:
                return  # it has told the server nothing
            try:
                self._find_run()
                self._send_status(operation)
            except server_errors() as error:
                self._say_away(error)
        self.sync()

    def request(self, kind: str, subject: str, body: Mapping[str, Any]) -> Any | None:
        """Have an operation of the kind of a handler done, and return what the handler does.

        Returns:
            None where it waits in the outbox, or was refused.
        """
        with self._lock:
            key = self.outbox.add(kind, subject, body, again=True).key
        self._results.pop(key, None)
        self.sync()
        return self._results.pop(key, None)

    def _want(self, kind: str, subject: str, body: Mapping[str, Any]) -> None:
        with self._lock:
            self.outbox.add(kind, subject, body)
        self.sync()

    def waiting(self) -> int:
        """How many uploads wait: operations, and spools with points."""
        spools = [spool for spool in self.outbox.spools() if spool.exists()]
        behind = [spool for spool in spools if self.reader(spool).offset < spool.stat().st_size]
        return len(behind) + len(self.outbox.pending(self.run_id))

    def sync(self) -> bool:
        """Upload what waits, as far as the server takes it: the points first, then the operations in their order.

        What fails alone, while the server answers, waits for the next time, as do later operations of its kind and
        subject; all else is uploaded.

        Returns:
            Whether nothing waits any more. What failed is tried again after `RETRY_SECONDS`.
        """
        with self._lock:
            if time.monotonic() < self._next_try or (self._is_killed and self._client is None):
                return False
            try:
                self._find_run()
                is_all = self._upload()
            except server_errors() as error:
                self._say_away(error)
                return False
            self._say_back()
            if is_all:
                self._stuck.clear()
            else:
                self._next_try = time.monotonic() + RETRY_SECONDS
            return is_all

    def _upload(self) -> bool:
        """Upload what waits; whether all of it was taken."""
        stuck: set[tuple[str, str]] = set()
        for spool in self.outbox.spools():
            if not self._is_taken("points", partial(self._drain, self.reader(spool))):
                stuck.add(("points", spool.name))
        for operation in self.outbox.pending(self.run_id):
            subject = (operation.kind, operation.subject)
            if subject not in stuck and self._is_taken(operation.kind, partial(self._do, operation)):
                self.outbox.done(self.run_id, operation)
            else:
                stuck.add(subject)
        return not stuck

    def _is_taken(self, kind: str, upload: Callable[[], object]) -> bool:
        """Do an upload; False where it fails alone. The server's error is raised where it does not answer at all."""
        try:
            upload()
        except server_errors() as error:
            with suppress(*server_errors()):
                self._is_there(self.run_id)  # a server may close the connection on which it answered an error
            self._look_after_run()
            if kind not in self._stuck:
                told = (self.uri, why(error), kind, self.outbox.folder)
                logger.warning("tracking server %s %s when it is sent %s, which wait in %s; the rest goes on", *told)
                logger.debug("%s", first_line(error), exc_info=error)
            self._stuck.add(kind)
            return False
        return True

    def settle(self, patience: float, on_wait: Callable[[], None] = lambda: None) -> None:
        """Upload what waits, and wait for a server that is away.

        Args:
            patience: seconds to wait.
            on_wait: called before the waiting, if there is any.

        Raises:
            TrackingError: it is away still; what waits is uploaded by the next command.
        """
        end = time.monotonic() + patience
        if self.sync():
            return
        on_wait()
        while time.monotonic() < end:
            time.sleep(max(0.0, min(self._next_try, end) - time.monotonic()))
            self._next_try = min(self._next_try, end)
            if self.sync():
                return
        raise TrackingError(
            f"the work is done, and {self.waiting()} uploads wait in {self.outbox.folder}: the tracking server "
            f"{self.uri} cannot take them now. `raydetr track sync -c FILE`, or the same command again, uploads them"
        )

    def reader(self, spool: Path) -> SpoolReader:
        """Return a reader that begins where the uploads of this spool to this run ended."""
        state = self._state(spool)
        size = spool.stat().st_size if spool.exists() else 0
        return SpoolReader(spool, state["offset"] if state["offset"] <= size else 0)

    def drain(self, reader: SpoolReader) -> int:
        """Upload the new records of a spool with their own time stamps and steps, in batches.

        After each batch the offset is written beside the spool, and the last step of each metric, so that the steps
        that a restart repeats are not logged twice.

        Args:
            reader: from `reader`; it stays where it was when the server is away, so that the next call tries again.

        Returns:
            How many metric values were uploaded.
        """
        with self._lock:
            start = reader.offset
            if time.monotonic() < self._next_try:
                return 0
            try:
                self._find_run()
                uploaded = self._drain(reader)
            except server_errors() as error:
                reader.offset = max(start, self.reader(reader.path).offset)
                self._say_away(error)
                return 0
            self._say_back()
            return uploaded

    def reach(self) -> None:
        """Find the run, or make it, unless the server is away or the run has been killed by now."""
        with self._lock:
            try:
                if not self._is_killed and self.client and not self._is_killed:  # to connect takes seconds
                    self._find_run()
            except server_errors() as error:
                if self._required:
                    self._next_try = time.monotonic() + RETRY_SECONDS
                    raise UserError(
                        f"tracking.uri {self.uri}: the tracking server {why(error)}, and tracking.required is true. "
                        "Start the server, mend the address, or leave tracking.uri out to use a database under `runs`"
                    ) from error
                self._say_away(error)

    def _find_run(self) -> None:
        """Find the run that the run file names, or make one; the file knows the key of a new one before it is made."""
        if self.run_id:
            return
        recorded = self._recorded
        if recorded and shown(recorded["uri"]) != self.uri:
            logger.warning(
                "tracking.uri was %s and is now %s: the run goes on as a new MLflow run",
                *(shown(recorded["uri"]), self.uri),
            )
            recorded = None
        run_id = recorded["run_id"] if recorded else None
        if run_id and not self._is_there(run_id):
            logger.warning("MLflow run %s is gone from %s: a new one is made", run_id, self.uri)
            recorded, run_id = None, None
        self._recorded = {"uri": self.uri, "experiment": self._experiment, "run_id": run_id}
        self._recorded["key"] = (recorded or {}).get("key") or uuid.uuid4().hex
        if not run_id:
            self._experiment_id = self._make_experiment()
            write_json(self._run_file, self._recorded)
            self._recorded["run_id"] = run_id = self._make_run()
        write_json(self._run_file, self._recorded)
        self.run_id = run_id

    def _is_there(self, run_id: str) -> bool:
        """Whether the server knows a run; one that was deleted is taken back."""
        try:
            run = self.client.get_run(run_id)
        except server_errors() as error:
            if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        if run.info.lifecycle_stage == "deleted":
            self.client.restore_run(run_id)
        self._experiment_id = run.info.experiment_id
        return True

    def _make_run(self) -> str:
        """Make the run that the run file speaks of, unless an answer to its making was lost."""
        key, started = self._recorded["key"], round(self.outbox.since() * 1000)  # type: ignore[index]
        found = self.client.search_runs([self._experiment_id], f"tags.`{RUN_TAG}` = '{key}'")
        made = found[0] if found else None
        if made is None:
            tags = {RUN_TAG: key, FOLDER_TAG: self._where or str(self._run_file.parent.resolve())}
            made = self.client.create_run(self._experiment_id, started, tags, self._run_name)
        return str(made.info.run_id)

    def _make_experiment(self) -> str:
        found = self.client.get_experiment_by_name(self._experiment)
        if found is None:
            try:
                location = artifact_location(self.uri, self._experiment)
                return str(self.client.create_experiment(self._experiment, location))
            except server_errors() as error:
                found = self.client.get_experiment_by_name(self._experiment)
                if error_code(error) != "RESOURCE_ALREADY_EXISTS" or found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _do(self, operation: Operation) -> None:
        handler = self.handlers.get(operation.kind)
        if handler is None:
            self.outbox.refuse(operation.kind, operation.body, "this version does not know such an upload", "")
            return
        try:
            self._results[operation.key] = handler(self, operation)
        except UserError as error:
            self.outbox.refuse(operation.kind, {"name": operation.subject, **operation.body}, str(error), "")
        except server_errors() as error:
            if not is_refusal(error):
                raise
            self._look_after_run()
            what = {"name": operation.subject, **operation.body}
            self.outbox.refuse(operation.kind, what, error_code(error), first_line(error))

    def _look_after_run(self) -> None:
        """When something is refused: was it the run that is gone? Then it is made anew, and gets everything."""
        if not self._is_there(self.run_id):
            self.run_id = ""
            raise OSError(f"MLflow run {self._recorded} is gone")

    def _send_params(self, operation: Operation) -> None:
        from mlflow.entities import Param, RunTag

        names = self.outbox.legal(operation.body)
        texts = {names[key]: text for key, text in operation.body.items()}
        run = self.client.get_run(self.run_id).data
        new = [Param(key, text) for key, text in texts.items() if key not in run.params]
        tag_names = self.outbox.legal(f"continued.{key}" for key in texts)
        changed = [
            RunTag(tag, text)
            for key, text in texts.items()
            if (tag := tag_names[f"continued.{key}"])
            and (tag in run.tags or run.params.get(key, text) != text)
            and run.tags.get(tag) != text
        ]
        self._send("params", new, PARAMS, lambda some: self.client.log_batch(self.run_id, params=some))
        self._send("tags", changed, PARAMS, lambda some: self.client.log_batch(self.run_id, tags=some))

    def _send_tags(self, operation: Operation) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(name, text) for name, text in operation.body.items()]
        self._send("tags", tags, PARAMS, lambda some: self.client.log_batch(self.run_id, tags=some))

    def _send_dataset(self, operation: Operation) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        name, digest, source = (operation.body[key] for key in ("name", "digest", "source"))
        dataset = Dataset(name, digest, source_type="raydetr", source=json.dumps({"uri": source}))
        context = [InputTag("mlflow.data.context", operation.subject)]
        self.client.log_inputs(self.run_id, datasets=[DatasetInput(dataset, context)])

    def _send_artifacts(self, operation: Operation) -> None:
        path, folder = self.outbox.path(operation.subject), operation.body["folder"]
        if not path.exists():
            raise UserError(f"{path} is gone")
        if path.is_dir():
            self.client.log_artifacts(self.run_id, str(path), folder)
        else:
            self.client.log_artifact(self.run_id, str(path), folder)

    def _send_status(self, operation: Operation) -> None:
        status = operation.body["status"]
        if operation is not self.outbox.last("status"):
            return  # what it became after that counts, and may be sent by now
        if status == "RUNNING":
            self.client.update_run(self.run_id, status=status)
        else:
            self.client.set_terminated(self.run_id, status, round(operation.time * 1000))

    def _send(self, kind: str, items: Sequence[Any], limit: int, send: Callable[[Sequence[Any]], object]) -> None:
        """Send in batches; of one that is refused, what is refused for itself is set aside, and the rest is sent."""
        for start in range(0, len(items), limit):
            batch = items[start : start + limit]
            try:
                send(batch)
            except server_errors() as error:
                if not is_refusal(error):
                    raise
                self._look_after_run()
                self._send_apart(kind, batch, send)

    def _send_apart(self, kind: str, items: Sequence[Any], send: Callable[[Sequence[Any]], object]) -> None:
        try:
            send(items)
        except server_errors() as error:
            if not is_refusal(error):
                raise
            if len(items) == 1:
                what = {"name": items[0].key, "value": str(items[0].value), "step": getattr(items[0], "step", None)}
                self.outbox.refuse(kind, what, error_code(error), first_line(error))
                return
            half = len(items) // 2
            self._send_apart(kind, items[:half], send)
            self._send_apart(kind, items[half:], send)

    def _drain(self, reader: SpoolReader) -> int:
        uploaded, state = 0, self._state(reader.path)
        while records := reader.read(limit=BATCH):
            steps = dict(state["steps"])
            metrics = self._new_metrics(records, steps)
            self._send("metric", metrics, BATCH, lambda some: self.client.log_batch(self.run_id, metrics=some))
            uploaded += len(metrics)
            state = {"run_id": self.run_id, "offset": reader.offset, "steps": steps}
            write_json(_state_file(reader.path), state)
        return uploaded

    def _new_metrics(self, records: list[SpoolRecord], steps: dict[str, int]) -> list[Any]:
        """The metrics of `records` that the run does not have; `steps`, the last step by name, are moved on.

        Beyond the last step all are new. Before it, what a restart repeats is not, and what was scored late is: the
        server knows.
        """
        from mlflow.entities import Metric

        names = self.outbox.legal(name for record in records for name in record.metrics)
        metrics: list[Any] = []
        known: dict[str, set[int]] = {}
        for record in records:
            for raw_name, value in record.metrics.items():
                name = names[raw_name]
                if record.step <= steps.get(name, -1):
                    if name not in known:
                        known[name] = {point.step for point in self.client.get_metric_history(self.run_id, name)}
                        known[name] |= {metric.step for metric in metrics if metric.key == name}
                    if record.step in known[name]:
                        continue
                metrics.append(Metric(name, value, round(record.time * 1000), record.step))
                known.get(name, set()).add(record.step)
                steps[name] = max(record.step, steps.get(name, -1))
        return metrics

    def _state(self, spool: Path) -> dict[str, Any]:
        """Return how far the spool is uploaded to this run; another run's state counts as nothing."""
        file = _state_file(spool)
        empty: dict[str, Any] = {"run_id": self.run_id, "offset": 0, "steps": {}}
        if not file.exists():
            return empty
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return state if state["run_id"] == self.run_id else empty

    def _say_away(self, error: Exception) -> None:
        if not self._is_away:
            folder = self.outbox.folder
            logger.warning("tracking server %s %s; what it is to get waits in %s", self.uri, why(error), folder)
            logger.debug("%s", first_line(error), exc_info=error)
        self._is_away = True
        self._next_try = time.monotonic() + RETRY_SECONDS

    def _say_back(self) -> None:
        if self._is_away:
            logger.warning("tracking server %s is back", self.uri)
        self._is_away = False


def _read_run_file(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
        return {**recorded, "uri": str(recorded["uri"]), "run_id": recorded["run_id"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} does not name an MLflow run; delete it to make a new run") from error


def _state_file(spool: Path) -> Path:
    return spool.with_name(f"{spool.name}.uploaded")
