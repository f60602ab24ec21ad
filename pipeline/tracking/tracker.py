"""Metrics on their way to MLflow: a spool on disk that training writes, and the tracker that uploads it.

Training workers never talk to a server. Rank 0 appends to a `Spool` (JSON lines); the driver holds a `Tracker`, which
makes the MLflow run (or continues the one named in its run file) and drains spools into it in batches. How far a spool
is uploaded is kept beside it, so a server that is away, or a driver that is killed, loses no point and doubles none.

MLflow is imported by the first `Tracker`, not by this module: that import takes seconds.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.values import flatten
from pipeline.errors import TrackingError, UserError
from pipeline.files import write_json
from pipeline.log import get_logger
from pipeline.tracking.server import artifact_location, connect, first_line, metric_name, server_errors
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


class Tracker:
    """The MLflow run of a pipeline run, on the driver's side.

    Args:
        uri: tracking server, or `sqlite:////absolute/path.db`.
        experiment: name of the MLflow experiment, made when missing.
        run_name: name of the MLflow run.
        run_file: JSON file that remembers the run (`uri`, `experiment`, `run_id`): when it is there, and the uri is the
            same, the run is continued, else a new one is made.

    Raises:
        UserError: the server cannot be reached and there is no run to continue.
    """

    def __init__(self, uri: str, experiment: str, run_name: str, run_file: Path) -> None:
        self.uri = uri
        self.client: MlflowClient = connect(uri)
        self._lock = threading.Lock()
        self._server_was_away = False
        self._next_try = 0.0
        run_id = self._continued_run(run_file)
        if run_id is None:
            run_id = self._new_run(experiment, run_name)
            write_json(run_file, {"uri": uri, "experiment": experiment, "run_id": run_id})
        self.run_id: str = run_id

    def _continued_run(self, run_file: Path) -> str | None:
        if not run_file.exists():
            return None
        try:
            recorded = json.loads(run_file.read_text(encoding="utf-8"))
            run_id, uri = str(recorded["run_id"]), recorded["uri"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{run_file} does not name an MLflow run; delete it to make a new run") from error
        if uri != self.uri:
            logger.warning("tracking.uri was %s and is now %s: the run goes on as a new MLflow run", uri, self.uri)
            return None
        try:
            run = self.client.get_run(run_id)
            if run.info.lifecycle_stage == "deleted":
                self.client.restore_run(run_id)
            self.client.update_run(run_id, status="RUNNING")
        except server_errors() as error:
            if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
                logger.warning("MLflow run %s is gone from %s: a new one is made", run_id, self.uri)
                return None
            logger.warning("tracking server %s is away (%s); points stay in the spool", self.uri, first_line(error))
        return run_id

    def _new_run(self, experiment: str, run_name: str) -> str:
        try:
            found = self.client.get_experiment_by_name(experiment)
            if found is None:
                experiment_id = self.client.create_experiment(experiment, artifact_location(self.uri, experiment))
            elif found.lifecycle_stage == "deleted":
                self.client.restore_experiment(found.experiment_id)
                experiment_id = found.experiment_id
            else:
                experiment_id = found.experiment_id
            return str(self.client.create_run(experiment_id, run_name=run_name).info.run_id)
        except server_errors() as error:
            raise UserError(
                f"tracking.uri {self.uri}: cannot make an MLflow run there ({first_line(error)}). Start the server, "
                "mend the address, or leave tracking.uri out to use a SQLite database under `runs`"
            ) from error

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log settings, nested mappings by dotted keys. One that differs from the run's first start becomes a tag.

        MLflow's params cannot change, and a run may be continued with more epochs: the new value is the tag
        `continued.<key>`.
        """
        from mlflow.entities import Param, RunTag

        texts = {key: str(value)[:PARAM_LENGTH] for key, value in flatten(params).items()}
        with self.talking():
            known = self.client.get_run(self.run_id).data.params
            new = [Param(key, text) for key, text in texts.items() if key not in known]
            for start in range(0, len(new), PARAMS):
                self.client.log_batch(self.run_id, params=new[start : start + PARAMS])
            changed = [RunTag(f"continued.{key}", text) for key, text in texts.items() if known.get(key, text) != text]
            if changed:
                self.client.log_batch(self.run_id, tags=changed[:PARAMS])

    def log_artifacts(self, path: Path, folder: str | None = None) -> None:
        """Upload a file, or all files of a folder, into `folder` of the run's artifacts."""
        with self.talking():
            if path.is_dir():
                self.client.log_artifacts(self.run_id, str(path), folder)
            else:
                self.client.log_artifact(self.run_id, str(path), folder)

    def finish(self, status: str = "FINISHED") -> None:
        """End the run: FINISHED, FAILED or KILLED."""
        with self.talking():
            self.client.set_terminated(self.run_id, status)

    def reader(self, spool: Path) -> SpoolReader:
        """Return a reader that begins where the uploads of this spool to this run ended."""
        state = self._state(spool)
        size = spool.stat().st_size if spool.exists() else 0
        return SpoolReader(spool, state["offset"] if state["offset"] <= size else 0)

    def drain(self, reader: SpoolReader, final: bool = False) -> int:
        """Upload the new records of a spool with their own time stamps and steps, in batches.

        After each batch the offset is written beside the spool, and the last step of each metric, so that the steps
        that a restart repeats are not logged twice.

        Args:
            reader: from `reader`; it stays where it was when the server is away, so that the next call tries again.
            final: raise when the server is away, instead of warning.

        Returns:
            How many metric values were uploaded.

        Raises:
            TrackingError: the server is away and `final` is set.
        """
        with self._lock:
            uploaded = 0
            if time.monotonic() < self._next_try and not final:
                return uploaded
            state = self._state(reader.path)
            while True:
                start = reader.offset
                records = reader.read(limit=BATCH)
                if not records:
                    return uploaded
                steps = dict(state["steps"])
                try:
                    uploaded += self._upload(records, steps)
                except server_errors() as error:
                    reader.offset = start
                    self._say_away(reader.path, error, final)
                    return uploaded
                if self._server_was_away:
                    logger.warning("tracking server %s is back", self.uri)
                    self._server_was_away = False
                state = {"run_id": self.run_id, "offset": reader.offset, "steps": steps}
                write_json(_state_file(reader.path), state)

    def _upload(self, records: list[SpoolRecord], steps: dict[str, int]) -> int:
        """Send the metrics of `records` that are beyond `steps` (last step by name), and advance `steps`."""
        from mlflow.entities import Metric

        metrics = []
        for record in records:
            for raw_name, value in record.metrics.items():
                name = metric_name(raw_name)
                if record.step > steps.get(name, -1):
                    metrics.append(Metric(name, value, round(record.time * 1000), record.step))
            for raw_name in record.metrics:
                name = metric_name(raw_name)
                steps[name] = max(record.step, steps.get(name, -1))
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + BATCH])
        return len(metrics)

    def _state(self, spool: Path) -> dict[str, Any]:
        """Return how far the spool is uploaded to this run; another run's state counts as nothing."""
        file = _state_file(spool)
        empty: dict[str, Any] = {"run_id": self.run_id, "offset": 0, "steps": {}}
        if not file.exists():
            return empty
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return state if state["run_id"] == self.run_id else empty

    def _say_away(self, spool: Path, error: Exception, final: bool) -> None:
        if final:
            raise TrackingError(
                f"tracking server {self.uri} is away ({first_line(error)}). Nothing is lost: the points that it has "
                f"not got are in {spool}; give the same command again when the server is back, and they are uploaded"
            ) from error
        if not self._server_was_away:
            logger.warning(
                "tracking server %s is away (%s); points stay in %s and are uploaded when it is back",
                self.uri,
                first_line(error),
                spool,
            )
        self._server_was_away = True
        self._next_try = time.monotonic() + RETRY_SECONDS

    @contextlib.contextmanager
    def talking(self) -> Iterator[None]:
        """Talk to the server inside the block, one thread at a time; its errors become `TrackingError`."""
        try:
            with self._lock:
                yield
        except server_errors() as error:
            raise TrackingError(f"tracking server {self.uri}: {first_line(error)}") from error


def _state_file(spool: Path) -> Path:
    return spool.with_name(f"{spool.name}.uploaded")
