"""Scoring in Ray's processes: what each is given, what Ray sets aside for it, and how it runs checkpoints' networks."""

import socket
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import ray

from jobs.cluster import check_alive, check_resources, device_of
from jobs.interrupt import in_thread
from jobs.tasks import LOOK_SECONDS, ended_of, result_of
from pipeline.config.sections import Config, EvaluateSection, OnError
from pipeline.data.manifest import Manifest
from pipeline.errors import UserError
from pipeline.evaluate.detect import Detection, detect_with, detector_for
from pipeline.evaluate.results import DETECTIONS_FILE, evaluate_checkpoint
from pipeline.mirror import checkpoint_here
from pipeline.predict.detector import Detector
from pipeline.run_folder import RunFolder

RETRIES = 3
"""Times that a share is done again whose process was lost, and that such a process begins again."""


@dataclass(frozen=True)
class Scoring:
    """What every task that scores checkpoints of a run goes by."""

    run: RunFolder
    evaluate: EvaluateSection
    device: str
    """Where the network runs, `cpu` or `cuda`."""
    cpus: float
    """CPUs that Ray sets aside for a task; also its torch threads."""
    gpus: float
    """GPUs that Ray sets aside for a task, or a part of one."""
    custom: dict[str, float]
    """Custom resources of a node that Ray sets aside for a task."""
    loader_workers: int
    """Processes that decode for a task."""
    on_error: OnError
    """Whether an image that cannot be read is an error or has no detections."""

    @property
    def resources(self) -> dict[str, float]:
        """What Ray sets aside for a task."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {}) | self.custom


class Scorer:
    """Runs checkpoints' networks in a process of Ray's, and keeps the last one for the next call."""

    def __init__(self, scoring: Scoring) -> None:
        import torch

        torch.set_num_threads(max(1, int(scoring.cpus)))
        self._scoring = scoring
        self._kept: tuple[Path, Detector] | None = None

    def detect(self, checkpoint: Path, split: Manifest, batches: Sequence[Sequence[int]]) -> list[Detection]:
        """The detections of a checkpoint, which does not change, in batches of a split.

        Raises:
            UserError: there is no such device, the checkpoint is not in its store, or as of `detect_with`.
        """
        if self._kept is None or self._kept[0] != checkpoint:
            self._kept = checkpoint, self._load(checkpoint, split)
        workers, on_error = self._scoring.loader_workers, self._scoring.on_error
        return detect_with(self._kept[1], split, batches, workers=workers, on_error=on_error)

    def evaluate(self, val: Manifest, train: Manifest | None, checkpoint: Path) -> tuple[dict[str, Any], bytes]:
        """Score a checkpoint alone; it may be another one than before under the same name.

        Returns:
            The metrics and the file of the detections.

        Raises:
            UserError: as of `evaluate_checkpoint`.
        """

        def detect_all(split: Manifest, path: Path, batches: list[list[int]]) -> Iterator[list[Detection]]:
            yield self.detect(path, split, batches)

        self._kept, section = None, self._scoring.evaluate
        sample = (train, partial(detect_all, train)) if train else None
        with checkpoint_here(self._scoring.run, checkpoint) as path, tempfile.TemporaryDirectory() as folder:
            metrics, _ = evaluate_checkpoint(
                path, val, section, Path(folder), partial(detect_all, val), train=sample, subset=section.subset
            )
            return metrics | {"checkpoint": str(checkpoint)}, Path(folder, DETECTIONS_FILE).read_bytes()

    def _load(self, checkpoint: Path, split: Manifest) -> Detector:
        import torch

        if self._scoring.device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                f"{socket.gethostname()}: torch finds no GPU there to score on; set evaluate.device: cpu, or install "
                "a CUDA build of torch"
            )
        with checkpoint_here(self._scoring.run, checkpoint) as path:
            return detector_for(split, path, self._scoring.evaluate, self._scoring.device)


def new_scorer(scoring: Scoring, **options: int) -> Any:
    """A `Scorer` as an actor of the connected Ray, which begins as soon as there is room; `options` are of Ray's."""
    # See jobs/tasks.py on the strategy.
    asked = {"num_cpus": scoring.cpus, "num_gpus": scoring.gpus, "resources": scoring.custom}
    return ray.remote(**asked, **options, scheduling_strategy="DEFAULT")(Scorer).remote(scoring)


def end_scorers(scorers: Iterable[Any]) -> None:
    """End the processes of actors of a Ray that may be gone."""
    for scorer in scorers:
        in_thread(partial(ray.kill, scorer), "ray-kill")


class ScorerPool:
    """Scorers that share the batches of checkpoints; a context manager, which ends them.

    They begin when they are needed, and only what has begun is given work: where there is room for fewer than are
    wanted, those do it all. What one that is lost had to do is done again by its successor.

    Args:
        scoring: what they go by.
        at_once: the most of them.
    """

    def __init__(self, scoring: Scoring, at_once: int) -> None:
        self.at_once = at_once
        self._scoring = scoring
        self._idle: list[Any] = []
        self._running: dict[Any, Any] = {}
        """Each with its call, by the reference of that; one that begins has the call that waits for it."""

    def __enter__(self) -> "ScorerPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end_scorers(self._running.values())
        self._end_idle()

    def detect(
        self, checkpoint: Path, split: Manifest, shares: Sequence[list[list[int]]]
    ) -> Iterator[tuple[list[list[int]], list[Detection]]]:
        """The detections of shares of a split's batches, each with its share, in the order in which they end.

        Raises:
            UserError: one met it.
        """
        waiting, given = list(reversed(shares)), dict[Any, list[list[int]]]()
        while waiting or given:
            while waiting and self._idle:
                scorer, share = self._idle.pop(), waiting.pop()
                reference = scorer.detect.remote(checkpoint, split, share)
                self._running[reference], given[reference] = scorer, share
            while len(self._running) < min(self.at_once, len(given) + len(waiting)):
                scorer = new_scorer(self._scoring, max_restarts=RETRIES, max_task_retries=RETRIES)
                self._running[scorer.__ray_ready__.remote()] = scorer
            ended = ended_of(list(self._running), 1, LOOK_SECONDS)
            for reference in ended:
                found = result_of(reference)
                self._idle.append(self._running.pop(reference))
                if reference in given:
                    yield given.pop(reference), found
            if not ended:
                check_alive()
                self._end_idle()  # a lost one may wait for the room to begin again

    def _end_idle(self) -> None:
        end_scorers(self._idle)
        self._idle = []


def scoring_of(config: Config) -> Scoring:
    """What tasks on the connected Ray go by.

    Raises:
        UserError: `evaluate.device` is cuda, and there is no GPU; or no node has what `cluster.resources` asks for.
    """
    device = device_of(config.cluster) if config.evaluate.device == "auto" else config.evaluate.device
    gpus = config.evaluate.gpus if device == "cuda" else 0
    have = ray.cluster_resources().get("GPU", 0)
    if config.evaluate.device == "cuda" and have < gpus and config.cluster.wait is None:
        raise UserError(
            f"evaluate.device cuda with evaluate.gpus {gpus:g}: the Ray cluster has {have:g} GPUs; set it to cpu or "
            "auto, or add nodes"
        )
    workers = config.evaluate.loader_workers
    scoring = Scoring(
        config.folder,
        config.evaluate,
        device,
        config.cluster.cpus_per_worker,
        gpus,
        config.cluster.resources.evaluate,
        config.train.loader_workers if workers is None else workers,
        config.dataset.on_error,
    )
    check_resources(config.cluster, "evaluate", scoring.resources)
    return scoring
