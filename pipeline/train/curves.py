"""The training curves, as a run writes them down and tells them."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from pipeline.config.sections import TrainSection
from pipeline.errors import UserError
from pipeline.log import get_logger
from pipeline.tracking.spool import Spool

Canvases = Sequence[tuple[int, ...]]
"""Heights and widths in pixels."""

logger = get_logger(__name__)


class Curves:
    """The points of the training curves, which rank 0 appends to the spool: each once, whatever is restarted.

    A point that cannot be written is kept as `error`, for the ranks to agree on: rank 0 alone must not give up.

    Args:
        spool: the file; None on the other ranks, which write nothing.
        train: how often a point is due, and the images of a step.
        total: steps of the schedule.
        epochs: gives the epochs that so many steps make.
        first: step that training begins or goes on with.
        least: gives the least time in which this rank could compute micro-batches on canvases, where that is known.

    Raises:
        UserError: the spool cannot be opened.
    """

    def __init__(
        self,
        spool: Path | None,
        train: TrainSection,
        total: int,
        epochs: Callable[[int], float],
        first: int,
        least: Callable[[Canvases], float] | None = None,
    ) -> None:
        self._train, self._total, self._epochs = train, total, epochs
        self._spool = Spool(spool) if spool is not None else None
        self._least, self._computed = least, 0.0
        self._done, self._since, self._waited = first, time.perf_counter(), 0.0
        self.error: Exception | None = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Its block waits for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def step_done(
        self, step: int, values: dict[str, float], optimizer: torch.optim.Optimizer, canvases: Canvases = ()
    ) -> None:
        """Write a point after `step` if one is due: every `log_steps`, and after the first and the last step.

        Args:
            step: its number.
            values: its losses and what else there is of it.
            optimizer: has the learning rates.
            canvases: of this rank's micro-batches.
        """
        done = step + 1
        if self._least is not None:
            self._computed += self._least(canvases)
        if self._spool is None or not (done % self._train.log_steps == 0 or done in (1, self._total)):
            return
        now = time.perf_counter()
        per_step = (now - self._since) / (done - self._done)
        rate = self._train.global_batch / per_step
        known = {name: value for name, value in values.items() if math.isfinite(value)}  # no norm of an overflow
        point = {**known, "epoch": self._epochs(done), "images_per_second": rate}
        point |= {"data_wait": self._waited / (now - self._since), "hours_left": (self._total - done) * per_step / 3600}
        if self._least is not None:
            point["model_flop_utilisation"] = self._computed / (now - self._since)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            point["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._done, self._since, self._waited, self._computed = done, now, 0.0, 0.0
        point |= {f"lr_{group['name']}": group["lr"] for group in optimizer.param_groups}
        try:
            self._spool.write_once(done, {f"train/{name}": value for name, value in point.items()}, "train/loss")
        except (OSError, UserError) as error:
            self.error = error
        logger.info(
            "step %d/%d  epoch %.2f  loss %.4f  gradient %.3f  %.1f images/s",
            *(done, self._total, point["epoch"], values["loss"], values["grad_norm"], rate),
        )

    def close(self) -> None:
        """Close the spool."""
        if self._spool is not None:
            self._spool.close()
