"""Evaluation beside training: a new checkpoint is scored in one process of Ray's, as soon as the cluster has room.

Nothing waits for it: where there is no room while workers train, the checkpoint is scored when training has ended.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError

from jobs.cluster import check_alive
from jobs.interrupt import RayLostError, in_thread
from jobs.room import is_free
from jobs.scoring import end_scorers, new_scorer, scoring_of
from jobs.tasks import result_of
from pipeline.config.sections import Config
from pipeline.data.manifest import Manifest
from pipeline.errors import StoreError, UserError
from pipeline.evaluate.claims import Claims
from pipeline.log import get_logger

logger = get_logger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks for a result that is waited for."""
IDLE_SECONDS = 10.0
"""A process that has nothing to score is kept for so long: workers that were lost may need its room to begin again."""


class EvaluationBeside:
    """Scores the checkpoints that come while workers train; a context manager, which ends with the tasks.

    Args:
        config: the pipeline.
        manifest: of the validation split.
        scored: called with each checkpoint's name and metrics, in the driver.
        train: of the training split, for `evaluate.train_sample`.
        samples: images of the training split; None where every checkpoint is scored.
        claims: what is scored, and by whom; of the driver where it is None.
        at_once: most checkpoints at a time.

    Raises:
        UserError: `evaluate.subset` is no subset, or `evaluate.device` is not there.
    """

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        scored: Callable[[str, dict[str, Any]], None],
        train: Manifest | None = None,
        samples: int | None = None,
        claims: Claims | None = None,
        at_once: int = 1,
    ) -> None:
        self._config, self._scored, self._samples, self._at_once = config, scored, samples, at_once
        self._claims = claims or Claims(config.folder, "driver")
        subset = config.evaluate.subset
        if subset >= len(manifest.samples):
            raise UserError(
                f"evaluate.subset {subset}: {manifest.folder} has {len(manifest.samples)} images; give fewer, or leave "
                "it out to score all of them"
            )
        self._scoring, self._splits = scoring_of(config), (manifest, train)
        self._done: set[str] = set()
        self._running: dict[Any, tuple[Path, Any]] = {}
        """Checkpoints and who scores them."""
        self._idle: list[Any] = []
        """Kept while there is more to be scored: they would hold what others may need."""
        self._idle_since = 0.0

    def __enter__(self) -> "EvaluationBeside":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._running and error is None:
            self.collect(LOOK_SECONDS)
            check_alive()
        end_scorers(scorer for _, scorer in self._running.values())
        self.end_idle()

    def begin(self) -> None:
        """Begin with the newest checkpoint that nobody has begun, if there is room: while all workers have theirs."""
        if len(self._running) >= self._at_once:
            return
        new, subset = self.due(), self._config.evaluate.subset
        if not new:
            self.end_idle()
        if not new or not (self._idle or is_free(self._scoring.resources)):
            return
        path = None
        with suppress(StoreError):  # the next look may find it there
            path = next((path for path in reversed(new) if self._claims.take(path.name, subset)), None)
        if path is None:
            return
        scorer = self._idle.pop() if self._idle else new_scorer(self._scoring)
        self._running[scorer.evaluate.remote(*self._splits, path)] = path, scorer
        self._done.add(path.name)

    def due(self) -> list[Path]:
        """The checkpoints that are to be scored, and that this command has not begun, oldest first."""
        there = self._claims.checkpoints()
        new = [path for path in there if path.name not in self._done and self._is_wanted(path.name)]
        self._done |= {path.name for path in new if self._claims.is_scored(path.name, self._config.evaluate.subset)}
        return [path for path in new if path.name not in self._done]

    def end_idle(self) -> None:
        """Give back the room of what scores nothing."""
        end_scorers(self._idle)
        self._idle = []

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs."""
        return not self._running

    def _is_wanted(self, name: str) -> bool:
        step = int(name.removeprefix("checkpoint-"))
        return self._samples is None or self._config.scores_beside(step, self._samples)

    def collect(self, seconds: float = 0) -> None:
        """Tell what has been scored, waiting so long for it. What failed is told; the end tries it again."""
        subset = self._config.evaluate.subset
        if self._idle and time.monotonic() - self._idle_since >= IDLE_SECONDS:
            self.end_idle()
        done, _ = in_thread(lambda: ray.wait(list(self._running), timeout=seconds), "ray-wait").result()
        for reference in done:
            path, scorer = self._running.pop(reference)
            self._idle.append(scorer)
            self._idle_since = time.monotonic()
            try:
                metrics, detections = result_of(reference)
                self._claims.keep(path.name, subset, metrics, detections)
            except (UserError, RayError, RayLostError) as error:  # whether all of Ray is lost, others look
                self.end_idle()  # it may be lost
                if isinstance(error, StoreError):  # which may be there the next time
                    self._done.discard(path.name)
                if path in self._claims.checkpoints():  # and was not removed for newer ones
                    logger.warning("evaluate: %s beside training: %s", path.name, str(error).strip().splitlines()[-1])
            else:
                self._scored(path.name, metrics)
            self._claims.give_back(path.name, subset)
