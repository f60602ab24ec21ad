"""jobs/metrics.py: a monitor that asks the node finds the gauges of a run."""

import logging
import time
import urllib.error
import urllib.request
from contextlib import suppress

import pytest
import ray

from jobs.metrics import RunMetrics
from tests.heads import free_port

WAIT_SECONDS = 60


def test_the_gauges_are_on_the_nodes_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    port = free_port()
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, logging_level=logging.ERROR, _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": 500},
    )  # fmt: skip
    try:
        metrics = RunMetrics("cells")
        metrics.trained(70, {"train/images_per_second": 12.5, "train/data_wait": 0.25})
        metrics.uploaded(3)
        assert shown(port) == {
            "raydetr_step": 70,
            "raydetr_images_per_second": 12.5,
            "raydetr_data_wait": 0.25,
            "raydetr_uploads_waiting": 3,
        }
    finally:
        ray.shutdown()


def shown(port: int) -> dict[str, float]:
    """The gauges of the run, once all four are there."""
    found: dict[str, float] = {}
    end = time.monotonic() + WAIT_SECONDS
    while len(found) < 4 and time.monotonic() < end:
        with suppress(urllib.error.URLError, OSError):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                lines = answer.read().decode().splitlines()
            ours = [line for line in lines if line.startswith("ray_raydetr_") and 'run="cells"' in line]
            found = {line.partition("{")[0].removeprefix("ray_"): float(line.split()[-1]) for line in ours}
        time.sleep(0.2)
    return found
