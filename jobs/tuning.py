"""Trains a pipeline with other settings, trial by trial, on Ray Tune, and registers the best.

A trial is a run as any other, beside the sweep's own folder; Tune begins as many as there is room for and, with ASHA,
says which are not worth more training. What is done is known from these folders, so Tune itself restores nothing: the
same command again leaves out the trials that are done, and the others go on from their checkpoints.
"""

import logging
import os
import shutil
import signal
import sys
import time
from concurrent.futures import wait
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from jobs import track
from jobs.cluster import check_alive, device_of, loss_told, resources_of
from jobs.console import make_console
from jobs.interrupt import Interrupted, in_thread
from jobs.register import best_checkpoint
from jobs.room import room
from jobs.run import Pipeline
from jobs.trials import Sweep, Trial, write_results
from pipeline.config.sections import Config
from pipeline.errors import UserError
from pipeline.evaluate.parallel import plot_parallel
from pipeline.files import is_held, make_folder, write_json
from pipeline.log import get_logger, outcome, set_up_logging
from pipeline.registry.register import Registration
from pipeline.tracking.spool import Spool
from pipeline.train.initial import check_init
from pipeline.train.scores import scored

logger = get_logger(__name__)

POLL_SECONDS = 1.0
"""Between two looks whether the trials are done."""
STOP_POLL_SECONDS = 0.2
"""Between two looks whether the sweep is to end, and then whether its trials have ended."""
STOP_SECONDS = 6.0
"""Longest wait, when the command is to end, for the steps in flight of the trials and their checkpoints."""
REDUCTION = 3
"""Of so many trials that came as far, ASHA lets one go on: at the first checkpoint, and at this multiple of each."""
PIN = 0.001
"""Part of a node's own resource that a trial takes, so that it begins there."""

ENVIRONMENT = {
    # What Tune would write of each trial stands in its folder.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The output that a callback may take the place of.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Trials stay in the directory that the driver runs in, so that relative paths mean the same.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def run_sweep(sweep: Sweep, at_once: int | None = None) -> dict[str, Any]:
    """Run the trials that are not done, and register the best.

    Args:
        sweep: what is tried.
        at_once: trials that run at the same time; None takes as many as there is room for.

    Returns:
        "trials", the rows of the table, the best first; "best", its configuration's file; "registered", the version, or
        None where the tracking server refused it; "plot" and "page", where the rest is.

    Raises:
        UserError: the name is another sweep's, no trial could be done, or the input is wrong.
        TrackingError: all is done, and uploads wait.
    """
    for trial in sweep.trials:
        check_init(trial.config.train.init, trial.config.folder.checkpoints)
    with Pipeline(sweep.config) as pipeline:
        sweep.check_begun()
        manifests = pipeline.shard()
        tracker = pipeline.tracker
        track.tell_about(tracker, sweep.config, manifests)
        over = ", ".join(f"`{key}={values}`" for key, values in sweep.asked["over"].items())
        tracker.log_tags({"mlflow.note.content": f"**Sweep** of {len(sweep.trials)} trials over {over}."})
        waiting = [trial for trial in sweep.trials if not sweep.is_done(trial)]
        if len(waiting) < len(sweep.trials):
            done = f"{len(sweep.trials) - len(waiting)} of {len(sweep.trials)} trials"
            pipeline.console.print(outcome("sweep", done, is_new=False))
        if waiting:
            _run_trials(sweep, waiting, len(manifests["train"].samples), at_once)
        best = sweep.best()
        if best is None:
            errors = [told for trial in sweep.trials if (told := sweep.found(trial).get("error"))]
            raise UserError(f"no trial of {sweep.config.name} came to its end: {errors[0] if errors else 'no room'}")
        best.config.folder.pruned.unlink(missing_ok=True)  # whoever gives its configuration wants it to go on
        registration = _register(best, sweep)
        table, chosen = write_results(sweep)
        rows, keys = sweep.rows(), list(best.settings)
        plot = plot_parallel(rows, keys, sweep.metric, sweep.config.folder.path / "parallel.png")
        for file in (table, chosen, plot):
            tracker.log_artifacts(file)
        with Spool(sweep.config.folder.evaluate_spool) as points:
            points.write_once(len(rows), {f"val/{sweep.metric}": rows[0][sweep.metric]}, f"val/{sweep.metric}")
        tracker.log_points(sweep.config.folder.evaluate_spool)
    for trial in sweep.trials:
        if (found := sweep.found(trial)).get("waits"):
            track.sync(trial.config)
            write_json(sweep.record(trial), found | {"waits": False})
    registration = registration or _register(best, sweep)
    registered = f"models:/{registration.name}/{registration.version}" if registration else None
    return {"trials": rows, "best": str(chosen), "registered": registered, "plot": str(plot), "page": tracker.page}


def _register(best: Trial, sweep: Sweep) -> Registration | None:
    """Register the best checkpoint of the best trial; None where that waits, or is refused."""
    with Pipeline(best.config, wait=True, sweep=sweep.config.name) as pipeline:
        registration = pipeline.register()
    write_json(sweep.record(best), sweep.found(best) | {"waits": pipeline.tracker.waiting() > 0})
    return registration


def _run_trials(sweep: Sweep, waiting: list[Trial], images: int, at_once: int | None) -> None:
    """Run trials on the connected Ray to their ends; what they come to stands in their records then."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it misses the files that it does not write
    folder = sweep.config.folder
    folder.stop.unlink(missing_ok=True)
    shutil.rmtree(folder.path / "ray", ignore_errors=True)
    make_folder(sweep.record(waiting[0]).parent)
    at_once = at_once or _room(sweep.config, with_evaluation=sweep.asked["search"] == "asha")
    logger.info("sweep: %d trials, %d at once", len(waiting), at_once)
    # A trial's own process trains nothing: it is the driver of its workers, and stays where this driver is.
    here = tune.PlacementGroupFactory([{"CPU": 0, f"node:{ray.util.get_node_ip_address()}": PIN}])
    trainable = tune.with_parameters(_trial, sweep=sweep, images=images, root=Path.cwd(), words=sys.argv)
    tuner = tune.Tuner(
        tune.with_resources(trainable, here),
        param_space={"trial": tune.grid_search([trial.number for trial in waiting])},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=at_once,
            scheduler=Asha(sweep, images) if sweep.asked["search"] == "asha" else None,
            reuse_actors=False,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(folder.path),
            verbose=0,
            callbacks=[_Shown(sweep)],
            failure_config=tune.FailureConfig(max_failures=sweep.config.train.max_restarts),
        ),
    )
    future = in_thread(tuner.fit, "ray-tune")
    try:
        while not wait([future], POLL_SECONDS).done:
            check_alive()
    except Interrupted:
        folder.stop.touch()
        end = time.monotonic() + STOP_SECONDS
        while time.monotonic() < end and any(is_held(trial.config.folder.lock) for trial in waiting):
            time.sleep(STOP_POLL_SECONDS)
        raise
    with loss_told():
        results = future.result()
    for result in results:
        if result.error is not None:
            trial = sweep.trials[result.config["trial"] - 1]
            _fail(sweep, trial, result.error)
    for trial in waiting:
        if (found := sweep.found(trial)).get("state") == "failed":
            logger.warning("sweep: %s failed: %s; all of it is in %s", trial, found["error"], sweep.log(trial))


def _room(config: Config, *, with_evaluation: bool) -> int:
    """Trials that have room at the same time, each with one evaluation beside its workers where that is needed."""
    worker = resources_of(config.cluster, device_of(config.cluster))
    need = config.cluster.most_workers + (with_evaluation and config.evaluate.beside)
    return max(1, room(worker) // need)


def _fail(sweep: Sweep, trial: Trial, error: Exception) -> None:
    why = (str(error).strip().splitlines() or [repr(error)])[-1]
    write_json(sweep.record(trial), sweep.found(trial) | {"state": "failed", "error": why})


class _Unwritten:
    """Holds a sweep that Tune does not write to the disk with its own records: an address may have a password in it."""

    def __init__(self, sweep: Sweep | None = None) -> None:
        self._sweep = sweep

    def __reduce__(self) -> tuple[type["_Unwritten"], tuple[()]]:
        return _Unwritten, ()

    def trial(self, tuned: Any) -> Trial:
        """The trial that one of Tune's is."""
        assert self._sweep is not None, "what was written is never read"
        number: int = tuned.config["trial"]
        return self._sweep.trials[number - 1]


class Asha(ASHAScheduler):  # type: ignore[misc]
    """ASHA (arXiv 1810.05934) over the metric of the checkpoints that were scored, by epochs.

    A trial that is to stop is told by a file in its folder: it ends in order, as one whose patience is over.

    Args:
        sweep: what is tried; the scores of trials that are done already count.
        images: of an epoch.
    """

    def __init__(self, sweep: Sweep, images: int) -> None:
        longest = max(_epochs(each.config, each.config.train.total_steps(images), images) for each in sweep.trials)
        super().__init__(
            time_attr="epochs",
            metric="score",
            mode="max",
            max_t=longest,
            grace_period=min(longest, *(trial.config.train.checkpoint_epochs for trial in sweep.trials)),
            reduction_factor=REDUCTION,
        )
        self._kept = _Unwritten(sweep)
        for trial in sweep.trials:
            if sweep.is_done(trial):
                before = SimpleNamespace(trial_id=trial.config.name)
                self.on_trial_add(None, before)
                for epochs, score in sweep.found(trial)["curve"]:
                    super().on_trial_result(None, before, {"epochs": epochs, "score": score})
                self.on_trial_remove(None, before)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Ray's own, but that the trial ends by itself."""
        if super().on_trial_result(tune_controller, trial, result) == TrialScheduler.STOP and not result["is_last"]:
            told = {key: result[key] for key in ("checkpoint", "epochs", "score")}
            write_json(self._kept.trial(trial).config.folder.pruned, told)
        return str(TrialScheduler.CONTINUE)


def _step(checkpoint: str) -> int:
    return int(checkpoint.removeprefix("checkpoint-"))


def _epochs(config: Config, steps: int, images: int) -> float:
    return steps * config.train.global_batch / images


class _Shown(TrialProgressCallback):  # type: ignore[misc]
    """Tells what the trials do, in place of what Tune prints."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__()
        self._kept, self._score = _Unwritten(sweep), sweep.metric

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        make_console().print(f"sweep: {self._kept.trial(trial)}")

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if "score" in result:
            score, config = f"{self._score} {result['score']:.4f}", self._kept.trial(trial).config
            stops = "  stopped early" if config.folder.pruned.exists() else ""
            make_console().print(
                f"sweep: {config.name}  {result['checkpoint']}  epoch {result['epochs']:.2f}  {score}{stops}"
            )

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """The table tells it."""

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """The same."""


def _trial(params: dict[str, Any], *, sweep: Sweep, images: int, root: Path, words: list[str]) -> None:
    """What a trial does, in a process of its own."""
    trial = sweep.trials[params["trial"] - 1]
    os.chdir(root)
    sys.argv[:] = words
    with sweep.log(trial).open("a", encoding="utf-8", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        set_up_logging()
        if not sweep.config.folder.stop.exists():
            _run_trial(sweep, trial, images)


def _run_trial(sweep: Sweep, trial: Trial, images: int) -> None:
    """The steps of a run up to its scores."""
    stop = sweep.config.folder.stop
    reports = _Reports(trial.config, images)

    def poll() -> None:
        if stop.exists():
            raise Interrupted(signal.SIGTERM)
        reports.send()

    try:
        with Pipeline(trial.config, wait=True, sweep=sweep.config.name) as pipeline:
            in_thread(partial(_kill_when, stop, pipeline), "kill-when")
            reports.send()
            last = pipeline.train(poll)
            metrics = pipeline.evaluate()
            reports.send()
            checkpoint = last
            if trial.config.register_.which == "best":
                checkpoint, metrics = best_checkpoint(trial.config, last, metrics)
    except Interrupted as interrupted:
        logger.info("interrupted (%s)", interrupted)
    except Exception as error:  # one trial that fails does not end the others
        logger.exception("%s", trial)
        _fail(sweep, trial, error)
    else:
        step = _step(last.name)
        record = {
            "schedule": trial.schedule,
            "state": "done" if step == trial.config.train.total_steps(images) else "stopped early",
            "epochs": round(_epochs(trial.config, step, images), 2),
            "checkpoint": checkpoint.name,
            "metrics": {name: metrics[name] for name in ("AP", "AP50", sweep.metric)},
            "curve": reports.curve,
            "waits": pipeline.tracker.waiting() > 0,
        }
        write_json(sweep.record(trial), record)


def _kill_when(stop: Path, pipeline: Pipeline) -> None:
    while not stop.exists():
        time.sleep(STOP_POLL_SECONDS)
    pipeline.kill()


class _Reports:
    """Tells Tune the scores of a trial's checkpoints, each once."""

    def __init__(self, config: Config, images: int) -> None:
        self._config, self._images = config, images
        self._sent: set[str] = set()
        self.curve: list[tuple[float, float]] = []

    def send(self) -> None:
        """Tell those that are new."""
        config, images = self._config, self._images
        for name, score in scored(config.folder, config.register_.metric, config.evaluate.subset).items():
            if name not in self._sent:
                self._sent.add(name)
                step = _step(name)
                epochs, is_last = _epochs(config, step, images), step == config.train.total_steps(images)
                self.curve.append((epochs, score))
                tune.report({"epochs": epochs, "score": score, "checkpoint": name, "is_last": is_last})
