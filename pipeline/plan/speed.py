"""How long a step takes: what the ranks tell each other, and what each computes.

Collectives are rings: every rank sends its share of (ranks - 1) / ranks of the bytes in ranks - 1 messages, an
all-reduce twice that (Patarasuk and Yuan, 2009). At stage 0 reductions hide behind the backward pass of a step's last
micro-batch, all but the last bucket's. At the others they wait for the computation, and it for them, as DeepSpeed does
without `overlap_comm`; with it those of stages 2 and 3 hide behind the backward pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from pipeline.plan.memory import FLOAT, Layout
from pipeline.train.reduce import BUCKETS

BACKWARD = 2 / 3
"""Part of a micro-batch's time that its backward pass takes."""
PERSISTENT = 100_000
"""Parameters with fewer elements stay gathered at stage 3, unless DeepSpeed is told otherwise."""


@dataclass(frozen=True)
class Link:
    """The way from a GPU to the next in the ring."""

    bandwidth: float
    """Bytes a second, in one direction."""
    latency: float
    """Seconds until a message arrives."""

    def gather(self, size: float, ranks: int, calls: float = 1) -> float:
        """Seconds of all-gathers, or of reduce-scatters, of `size` bytes in so many calls."""
        return (ranks - 1) * (size / ranks / self.bandwidth + calls * self.latency)

    def all_reduce(self, size: float, ranks: int, calls: float = 1) -> float:
        """Seconds of all-reduces of `size` bytes in so many calls."""
        return 2 * self.gather(size, ranks, calls)


@dataclass(frozen=True)
class Exchange:
    """What the ranks of a run tell each other in a step."""

    layout: Layout
    stage: int
    """Of ZeRO."""
    zero: Mapping[str, Any]
    """DeepSpeed's section `zero_optimization`."""

    def seconds(self, ranks: int, micro_batches: int, compute: float, link: Link) -> float:
        """Seconds of a step in which a rank waits for the others.

        Args:
            ranks: that share the work.
            micro_batches: of a rank in a step.
            compute: seconds of a micro-batch.
            link: between the ranks.
        """
        gradients, bucket = FLOAT * self.layout.trained, self.zero["reduce_bucket_size"]
        if self.stage == 0:
            reduced = link.all_reduce(gradients, ranks, BUCKETS)
            return max(reduced / BUCKETS, reduced - BACKWARD * compute)
        calls = ceil(self.layout.trained / bucket)
        reduced = (link.gather if self.stage == 3 else link.all_reduce)(gradients, ranks, calls)
        if self.stage >= 2 and self.zero.get("overlap_comm"):
            reduced = max(0.0, reduced - BACKWARD * compute)
        if self.stage < 3:
            times = 1 if self.stage == 1 else micro_batches
            return times * reduced + link.gather(gradients, ranks, len(self.layout.groups))
        least = self.zero.get("stage3_param_persistence_threshold", PERSISTENT)
        cut = [size for sizes in (*self.layout.groups, self.layout.frozen) for size in sizes if size >= least]
        return micro_batches * (reduced + link.gather(FLOAT * sum(cut), ranks, len(cut)))
