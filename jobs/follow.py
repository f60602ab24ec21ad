"""Scores the checkpoints of a run that another command trains, as they appear: `raydetr evaluate -c F --follow`."""

import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from jobs.beside import LOOK_SECONDS, EvaluationBeside
from jobs.cluster import check_alive, connected
from jobs.evaluate import print_scores
from jobs.run import Pipeline
from pipeline.config.sections import Config
from pipeline.data.cache import cache_of
from pipeline.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from pipeline.errors import StoreError
from pipeline.evaluate.claims import Claims, following
from pipeline.log import get_logger
from pipeline.mirror import get
from pipeline.run_folder import METRICS_FILE, RunFolder
from pipeline.train.scores import is_exhausted, scored

logger = get_logger(__name__)

DRIVER_SECONDS = 5.0
"""Between two looks whether a command works on the run."""
WAIT = "waiting for it; Ctrl-C ends this, and the same command goes on"


def follow(config: Config) -> dict[str, Any]:
    """Score each checkpoint that the run writes, until that of its last step is scored; then do as `evaluate`.

    A run that has not begun, or that no command works on, is waited for without a limit: tasks, and what Ray sets aside
    for them, are there while something is scored.

    Args:
        config: the pipeline, as it is trained with.

    Returns:
        The metrics of the last checkpoint.

    Raises:
        UserError: another command follows the run, or an input is wrong.
    """
    with connected(config.cluster):
        manifests = _wait_until_begun(config)
        with following(config.folder, f"following the run {config.name}") as renew:
            claims = Claims(config.folder, "follower")
            claims.clear()
            _follow(config, manifests, claims, renew)
        with Pipeline(config, wait=True) as pipeline:
            return pipeline.evaluate()


def _follow(config: Config, manifests: dict[str, Manifest], claims: Claims, renew: Callable[[], None]) -> None:
    train, val = manifests["train"], manifests["val"]
    total = config.train.total_steps(len(train.samples))
    sampled = train if config.evaluate.train_sample else None
    at_once = config.evaluate.workers or config.cluster.most_workers
    training = _Training(config, claims, total)
    logger.info("evaluate: following %s to step %d", config.folder, total)
    with EvaluationBeside(config, val, print_scores, sampled, len(train.samples), claims, at_once) as beside:
        while True:
            with suppress(StoreError):  # which is told; it is tried again
                renew()
                beside.begin()
                beside.collect(LOOK_SECONDS)
                if training.is_over() and beside.is_idle and not beside.due():
                    return
            if beside.is_idle:
                time.sleep(LOOK_SECONDS)
            check_alive()


class _Training:
    """What another command does with the run, and tells of it.

    Args:
        config: the pipeline.
        claims: of the follower.
        total: steps of the schedule.
    """

    def __init__(self, config: Config, claims: Claims, total: int) -> None:
        self._config, self._claims, self._last = config, claims, f"checkpoint-{total}"
        self._was_there = True
        self._looked = float("-inf")

    def is_over(self) -> bool:
        """Whether the checkpoint of the last step is there, or `train.patience` has ended the run."""
        names = [path.name for path in self._claims.checkpoints()]
        if self._last in names:
            return True
        if time.monotonic() - self._looked < DRIVER_SECONDS:
            return False
        self._looked, is_there = time.monotonic(), self._claims.other_is_there()
        if not is_there and names and self._is_no_better():
            return True
        if self._was_there and not is_there:
            at = names[-1] if names else "no checkpoint"
            logger.warning("evaluate: no command trains %s now (%s is there): %s", self._config.folder, at, WAIT)
        elif is_there and not self._was_there:
            logger.info("evaluate: a command works on %s again", self._config.folder)
        self._was_there = is_there
        return False

    def _is_no_better(self) -> bool:
        config = self._config
        if config.train.patience is None:
            return False
        with tempfile.TemporaryDirectory() as folder:
            run = config.folder if config.folder.store is None else _with_scores(config.folder, Path(folder))
            values = scored(run, config.register_.metric, config.evaluate.subset)
        return is_exhausted(values, config.train.patience)


def _with_scores(run: RunFolder, path: Path) -> RunFolder:
    """A copy of a run in a store that has nothing but the scores."""
    assert run.store is not None
    folder = run.store / run.evaluation.name
    for name in folder.list():
        if name.endswith(METRICS_FILE):
            get(folder / name, path / run.evaluation.name / name)
    return RunFolder(path)


def _wait_until_begun(config: Config) -> dict[str, Manifest]:
    """The manifests of both splits, once they are there and the run has begun."""
    run, files = config.folder, {split: config.shards_folder / split / MANIFEST_NAME for split in ("train", "val")}
    is_told = False
    while True:
        missing = [str(file) for file in files.values() if not file.exists()]
        if not missing and not (run.path.is_dir() if run.store is None else run.store.list()):
            missing = [str(run)]
        if not missing:
            return {split: read_manifest(config.shards_folder / split, cache_of(config.shards)) for split in files}
        if not is_told:
            logger.warning("evaluate: the run %s has not begun (no %s): %s", config.name, missing[0], WAIT)
        is_told = True
        check_alive()
        time.sleep(LOOK_SECONDS)
