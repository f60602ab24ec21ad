"""A trace of some steps by torch's profiler, for chrome://tracing or Perfetto."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.config.sections import ProfileSection
from pipeline.log import get_logger

logger = get_logger(__name__)


class StepProfile:
    """Traces the steps of `train.profile` on its rank.

    Args:
        section: which steps of which rank; None traces nothing.
        folder: of the run's traces.
        rank: of this process.
    """

    def __init__(self, section: ProfileSection | None, folder: Path, rank: int) -> None:
        self._section = section if section is not None and section.rank == rank else None
        self._folder = folder
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Step number `step`, from 0, begins."""
        if self._section is None:
            return
        first, last = self._section.steps
        if self._profile is None and first <= step <= last:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()
        elif step > last:
            self.close()

    def close(self) -> None:
        """Write the trace, if one was begun and is not written yet; a disk that does not take it ends no training."""
        if self._profile is None or self._section is None:
            return
        first, last = self._section.steps
        path = self._folder / f"steps-{first}-{last}-rank-{self._section.rank}.json.gz"
        self._profile.stop()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(path))
            logger.warning("%s written", path)
        except OSError as error:
            logger.warning("%s: cannot be written (%s)", path, error.strerror)
        self._profile, self._section = None, None
