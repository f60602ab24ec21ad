"""Scoring as Ray tasks: what each is given, what Ray sets aside for it, and how it runs a checkpoint's network."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from jobs.cluster import check_resources, device_of
from pipeline.config.sections import Config, EvaluateSection, OnError
from pipeline.data.manifest import Manifest
from pipeline.errors import UserError
from pipeline.evaluate.detect import Detection, detect
from pipeline.mirror import checkpoint_here
from pipeline.run_folder import RunFolder


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
    on_error: OnError
    """Whether an image that cannot be read is an error or has no detections."""

    @property
    def resources(self) -> dict[str, float]:
        """What Ray sets aside for a task."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {}) | self.custom

    @contextmanager
    def here(self, checkpoint: Path) -> Iterator[Path]:
        """A checkpoint in the block, in a process that is ready to run its network.

        Raises:
            UserError: there is no such device, or the checkpoint is not in its store.
        """
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                f"{socket.gethostname()}: torch finds no GPU there to score on; set evaluate.device: cpu, or install "
                "a CUDA build of torch"
            )
        torch.set_num_threads(max(1, int(self.cpus)))
        with checkpoint_here(self.run, checkpoint) as path:
            yield path

    def detect(self, checkpoint: Path, split: Manifest, batches: Sequence[Sequence[int]]) -> list[Detection]:
        """The detections of a checkpoint that is here."""
        return detect(checkpoint, split, batches, self.evaluate, self.device, on_error=self.on_error)


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
    cpus, custom = config.cluster.cpus_per_worker, config.cluster.resources.evaluate
    scoring = Scoring(config.folder, config.evaluate, device, cpus, gpus, custom, config.dataset.on_error)
    check_resources(config.cluster, "evaluate", scoring.resources)
    return scoring
