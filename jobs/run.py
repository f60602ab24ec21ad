"""The pipeline: its steps on one Ray and under one MLflow run, with what they do shown while they do it."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from jobs import evaluate, register, shard, track, train
from jobs.beside import EvaluationBeside
from jobs.cluster import connected
from jobs.console import ProgressDisplay, make_console
from jobs.interrupt import Interrupted, at_first_signal, in_thread
from jobs.metrics import RunMetrics
from jobs.options import Step, steps_between
from pipeline.checkpoint.find import newest_whole
from pipeline.checkpoint.state import latest
from pipeline.config.load import dump_config
from pipeline.config.sections import Config
from pipeline.data.cache import cache_of
from pipeline.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from pipeline.errors import UserError
from pipeline.evaluate.claims import Claims
from pipeline.log import get_logger
from pipeline.mirror import Mirror, driver_mirror
from pipeline.registry.parent import fetch_parent
from pipeline.registry.register import Registration
from pipeline.run_folder import METRICS_FILE
from pipeline.tracking.spool import SpoolReader, SpoolRecord
from pipeline.tracking.tracker import Tracker
from pipeline.train.initial import check_init
from pipeline.train.run import resume_point

logger = get_logger(__name__)

UPLOAD_SECONDS = 5
"""Seconds between two uploads of the training curves."""
FOLLOWER_SECONDS = 1
"""Seconds between two looks for what a follower scores."""
FINISH_SECONDS = 3
"""Longest wait for the tracking server when the command is to end."""


class Pipeline:
    """One run's steps; a context manager that holds Ray and the MLflow run for them.

    Each step finds what the step before it left on disk, so that they can be called one by one. Ray is there from the
    first step that has work for it: registering has none, and so many commands may register at once on one machine.

    Args:
        config: the pipeline.
        works_on_run: whether the run's folder is written, which only one command may do at a time.
        wait: wait for the other command instead of being refused.
        sweep: name of the sweep whose trial it is: its MLflow run stands below the sweep's, and at the end nobody waits
            for the tracking server.
    """

    def __init__(
        self, config: Config, *, works_on_run: bool = True, wait: bool = False, sweep: str | None = None
    ) -> None:
        self.config, self._sweep = config, sweep
        self._works_on_run, self._wait = works_on_run, wait
        self.console = make_console()
        self._stack = ExitStack()
        self._tracker: Tracker | None = None
        self._mirror: Mirror | None = None
        self._claims: Claims | None = None

    def __enter__(self) -> "Pipeline":
        with self._stack:  # closed if one of these fails
            if self._works_on_run:
                check_init(self.config.train.init, self.config.folder.checkpoints)
                name = f"the run {self.config.name}"
                self._mirror = self._stack.enter_context(driver_mirror(self.config.folder, name, wait=self._wait))
                self._claims = Claims(self.config.folder, "driver", self._mirror.sync)
                self._claims.clear()
                check_resume(self.config)
                fetch_initial(self.config)
            self._begin_kill = self._stack.enter_context(at_first_signal(self.kill, FINISH_SECONDS))
            self._ray = self._stack.enter_context(ExitStack())
            self._open = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
        with self._open:
            if is_interrupted:
                self._begin_kill()
            self._ray.__exit__(kind, error, trace)  # which is not needed while uploads wait; the run's lock is
            if self._tracker is None or is_interrupted:
                return
            if kind is None:
                self._tracker.finish("FINISHED")
                if self._sweep is None:
                    self._tracker.settle(self.config.tracking.patience, self._say_waiting)
            else:
                with suppress(UserError):  # what went wrong before is to be read, not that the disk is full as well
                    self._tracker.finish("FAILED")

    def _connect(self) -> None:
        """Be connected to Ray from now on."""
        self._ray.enter_context(connected(self.config.cluster))  # another time, this is the connection that there is

    def kill(self) -> None:
        """Tell the tracking server that the run ends, as quickly as can be."""
        if self._tracker is not None:
            with suppress(UserError):
                self._tracker.kill()

    def _say_waiting(self) -> None:
        minutes = self.config.tracking.patience / 60
        logger.warning("the work is done; waiting up to %.3g minutes for the tracking server to take the rest", minutes)

    @property
    def tracker(self) -> Tracker:
        """The MLflow run: continued if this pipeline run has one, made otherwise."""
        if self._tracker is None:
            # It is known before its run is made: that may be cut, and then the run has to be ended.
            self._tracker = track.open_tracker(self.config, reach=False)
            self._tracker.reach()
            self._tracker.start()
            self._tracker.log_params(dump_config(self.config))
            if self._sweep is not None:
                track.nest(self._tracker, self._sweep)
        return self._tracker

    def shard(self, *, verify: bool = False) -> dict[str, Manifest]:
        """Write the shards of both splits."""
        self._connect()
        return shard.shard(self.config, verify=verify)

    def train(self, on_poll: Callable[[], None] = lambda: None) -> Path:
        """Train to the end of the schedule; returns the last checkpoint. `on_poll` is called about every second."""
        assert self._mirror is not None, "training works on the run"
        self._connect()
        mirror, spool = self._mirror, self.config.folder.train_spool
        manifest, val = self._manifest("train"), self._val_manifest()
        total = self.config.train.total_steps(len(manifest.samples))
        uploaded, metrics = time.monotonic(), RunMetrics(self.config.name)
        with (
            self._tracking(manifest, val) as told,
            TrainingProgress(self.console, spool, total) as shown,
            self._evaluation_beside(val, manifest) as beside,
        ):

            def poll(keeps_room: bool) -> None:
                nonlocal uploaded
                mirror.check()
                if told.done():
                    told.result()
                self._take_home()
                on_poll()
                if newest := shown.update():
                    metrics.trained(newest.step, newest.metrics)
                if beside is not None:
                    beside.collect()
                    if keeps_room:
                        beside.end_idle()
                    elif newest:  # all workers have their place
                        beside.begin()
                if told.done() and time.monotonic() - uploaded >= UPLOAD_SECONDS:
                    self.tracker.sync()
                    metrics.uploaded(self.tracker.waiting())
                    uploaded = time.monotonic()

            last = train.train(self.config, manifest, on_poll=poll, sync=mirror.sync)
        self.tracker.sync()
        return last

    @contextmanager
    def _tracking(self, manifest: Manifest, val: Manifest | None) -> Iterator[Future[None]]:
        """Telling the MLflow run in a thread what is trained takes seconds, in which workers start."""
        told = in_thread(partial(self._tell_about, manifest, val), "tracking")
        if self.config.tracking.required:
            told.result()  # no step is done without the server
        try:
            yield told
        except Exception:
            wait([told])  # then that it has failed is the last that is told
            raise
        told.result()

    def _tell_about(self, manifest: Manifest, val: Manifest | None) -> None:
        """Tell the MLflow run what is trained on which data, and that its points come."""
        self.tracker.log_points(self.config.folder.train_spool)
        self.tracker.log_points(self.config.folder.evaluate_spool)
        track.tell_about(self.tracker, self.config, {"train": manifest} | ({"val": val} if val else {}))

    @contextmanager
    def _evaluation_beside(self, val: Manifest | None, train: Manifest) -> Iterator[EvaluationBeside | None]:
        """Evaluation of new checkpoints while workers train, where it is wanted and the validation shards are there."""
        if val is None or not self.config.evaluate.beside:
            yield None
            return
        tell = partial(evaluate.tell_scores, self.config.folder)
        sampled = train if self.config.evaluate.train_sample else None
        with EvaluationBeside(self.config, val, tell, sampled, len(train.samples), self._claims) as beside:
            yield beside

    def _take_home(self) -> None:
        """What a follower has scored becomes the run's."""
        assert self._claims is not None, "evaluating works on the run"
        self._claims.take_home(partial(evaluate.tell_scores, self.config.folder))

    @contextmanager
    def _claimed(self, name: str) -> Iterator[None]:
        """The checkpoint of a name is scored by nobody else in the block; it may have been scored by then."""
        assert self._claims is not None, "evaluating works on the run"
        is_told = False
        while not self._claims.take(name) and not (self.config.folder.evaluation / name / METRICS_FILE).exists():
            if not is_told:
                logger.info("evaluate: %s is being scored by `raydetr evaluate --follow`: waiting for it", name)
            is_told = True
            time.sleep(FOLLOWER_SECONDS)
            self._take_home()
        yield
        self._claims.give_back(name)

    def evaluate(self) -> dict[str, Any]:
        """Score the last checkpoint (every kept one with evaluate.curve) on the validation split."""
        self._connect()
        val, last = self._manifest("val"), self._last_checkpoint()
        self._take_home()
        return evaluate.evaluate(self.config, last, val, self.tracker, self._sampled(), self._claimed)

    def evaluate_weights(self, weights: Path, out: Path) -> dict[str, Any]:
        """Score a file of weights on the validation split, which is sharded for it; no MLflow run is made."""
        self._connect()
        return evaluate.evaluate_weights(self.config, weights, shard.shard(self.config, splits=["val"])["val"], out)

    def register(self) -> Registration | None:
        """Make a scored checkpoint a version of the registered model; None where that waits, or is refused."""
        return register.register(self.config, self._last_checkpoint(), self.tracker)

    def _manifest(self, split: str) -> Manifest:
        return read_manifest(self.config.shards_folder / split, cache_of(self.config.shards))

    def _val_manifest(self) -> Manifest | None:
        """That of the validation split, if it is sharded: training does not need it."""
        return self._manifest("val") if (self.config.shards_folder / "val" / MANIFEST_NAME).exists() else None

    def _sampled(self) -> Manifest | None:
        """That of the training split, where some of its images are scored."""
        return self._manifest("train") if self.config.evaluate.train_sample else None

    def _last_checkpoint(self) -> Path:
        folder = self.config.folder.checkpoints
        last = newest_whole(folder)
        if last is None:
            raise UserError(f"{folder}: there is no whole checkpoint to use; train first with `raydetr train`")
        return last[0]


class TrainingProgress:
    """Shows the training metrics that arrive in the spool from now on, once there is one; a context manager."""

    def __init__(self, console: Console, spool: Path, total_steps: int) -> None:
        self._reader = SpoolReader(spool, spool.stat().st_size if spool.exists() else 0)
        self._display = ProgressDisplay(console, "train: step", total_steps)
        self._is_first = True

    def __enter__(self) -> "TrainingProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.update(is_last=True)
        self._display.__exit__(*exception)

    def update(self, *, is_last: bool = False) -> SpoolRecord | None:
        """Show the newest point, and return it, if there are new ones."""
        records = self._reader.read()
        if not records:
            return None
        step, metrics = records[-1].step, records[-1].metrics
        text = (
            f"epoch {metrics['train/epoch']:.2f}  loss {metrics['train/loss']:.3f}"
            f"  {metrics['train/images_per_second']:.1f} images/s"
        )
        if self._is_first:
            self._display.__enter__()
        self._display.update(step, text, print_now=self._is_first or is_last)
        self._is_first = False
        return records[-1]


def check_resume(config: Config) -> None:
    """Refuse at once what training would refuse when its workers have started.

    Raises:
        UserError: the run was trained with other settings or on other data.
    """
    shards = config.shards_folder / "train"
    if latest(config.folder.checkpoints) is not None and (shards / MANIFEST_NAME).exists():
        manifest = read_manifest(shards, cache_of(config.shards))
        resume_point(train.make_job(config, manifest), manifest)


def fetch_initial(config: Config) -> None:
    """Download the registered version that training is to begin with, unless it has begun.

    Raises:
        UserError: as of `fetch_parent`.
    """
    init = config.train.init
    if init.weights is not None and init.is_registered and latest(config.folder.checkpoints) is None:
        fetch_parent(init.weights, config.tracking_uri, config.folder.parent)


def run_pipeline(config: Config, *, first: Step = "shard", last: Step = "register", wait: bool = False) -> None:
    """Do the steps from `first` to `last`, and end with a short table.

    Raises:
        UserError: `last` comes before `first`; or a step needs what one before `first` makes, and it is not there.
    """
    steps = steps_between(first, last)
    with Pipeline(config, wait=wait) as pipeline:
        done = {step: getattr(pipeline, step)() for step in steps}
        if last != "shard":
            print_summary(pipeline.console, config, done, pipeline.tracker)


def print_summary(console: Console, config: Config, done: Mapping[Step, Any], tracker: Tracker) -> None:
    """The short table at the end: what came of the steps that were done, and where it is."""
    console.print()
    if metrics := done.get("evaluate"):
        console.print(f"AP           {metrics['AP']:.4f}")
        console.print(f"AP50         {metrics['AP50']:.4f}")
    console.print(f"run          {config.folder}")
    if version := done.get("register"):
        champion = " @champion" if version.is_champion else ""
        console.print(f"registered   {version.name} version {version.version}{champion}")
    elif "register" in done:
        waits = f"waits in {tracker.outbox.folder}" if tracker.waiting() else "refused by the tracking server"
        console.print(f"registered   {waits}")
    console.print(f"MLflow page  {tracker.page}")
