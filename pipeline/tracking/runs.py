"""The runs that a tracking server knows, and whether anybody works on those that it believes to be running."""

import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.files import is_held
from pipeline.run_folder import RunFolder
from pipeline.tracking.server import every

FOLDER_TAG = "raydetr.folder"
"""Tag of a run with its folder, as the host that made it knows it."""
RUN_TAG = "raydetr.run"
"""Tag with the key of a run, by which it is found again when the answer to its making was lost."""
PAGE = 500


def list_runs(client: Any, limit: int) -> list[dict[str, Any]]:
    """The newest runs of the pipeline: name, status, AP, age in seconds, folder, and whether a command works on it.

    "worked_on" is None where the folder is not seen from here, or holds another run by now.
    """
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    ours = f"tags.`{RUN_TAG}` != ''"
    runs = every(lambda token: client.search_runs(experiments, ours, max_results=PAGE, page_token=token))
    return [_describe(run) for run in islice(runs, limit)]


def _describe(run: Any) -> dict[str, Any]:
    folder = run.data.tags.get(FOLDER_TAG)
    begun = run.info.start_time / 1000
    return {
        "name": run.info.run_name,
        "run_id": run.info.run_id,
        "status": run.info.status,
        "AP": run.data.metrics.get("val/AP"),
        "age": max(0.0, round(time.time() - begun, 1)),
        "started": time.strftime("%F %T", time.gmtime(begun)),
        "registered": run.data.tags.get("raydetr.registered"),
        "folder": folder,
        "worked_on": _is_worked_on(Path(folder), run.info.run_id) if folder else None,
    }


def _is_worked_on(folder: Path, run_id: str) -> bool | None:
    run = RunFolder(folder)
    try:
        recorded = json.loads(run.mlflow_run.read_text(encoding="utf-8"))["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return is_held(run.lock) if recorded == run_id else None
