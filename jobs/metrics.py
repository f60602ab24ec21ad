"""What a monitor sees of a training run: gauges on the metrics port of the Ray node that the driver is on.

infra/monitoring has Prometheus collect them, and rules that look at them; their names there begin with `ray_`.
"""

from collections.abc import Mapping

from ray.util.metrics import Gauge


class RunMetrics:
    """The gauges of a run. Ray must be connected.

    Args:
        run: name of the run, a label of each.
    """

    def __init__(self, run: str) -> None:
        self._step = _gauge("raydetr_step", "Optimizer steps that the run has made.", run)
        self._speed = _gauge("raydetr_images_per_second", "Images that the run trains on in a second.", run)
        self._data_wait = _gauge("raydetr_data_wait", "Part of the time that the first worker waits for data.", run)
        self._waiting = _gauge("raydetr_uploads_waiting", "Uploads that wait for the tracking server.", run)

    def trained(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the newest point of the training curves."""
        self._step.set(step)
        self._speed.set(metrics["train/images_per_second"])
        self._data_wait.set(metrics["train/data_wait"])

    def uploaded(self, waiting: int) -> None:
        """Show how much could not be uploaded."""
        self._waiting.set(waiting)


def _gauge(name: str, description: str, run: str) -> Gauge:
    gauge = Gauge(name, description=description, tag_keys=("run",))
    gauge.set_default_tags({"run": run})
    return gauge
