"""The runs of the team, and those that say RUNNING while no command works on them."""

import json
from pathlib import Path
from typing import Any

import typer

from jobs.console import print_table
from jobs.models import registry_uri


def show_runs(config: Path | None, tracking_uri: str | None, limit: int, *, as_json: bool) -> None:
    """Print the newest runs.

    Raises:
        UserError: there is no tracking server at the address, or it is away.
    """
    from pipeline.registry.versions import open_registry
    from pipeline.tracking.runs import list_runs

    with open_registry(registry_uri(config, tracking_uri)) as client:
        runs = list_runs(client, limit)
    if as_json:
        typer.echo(json.dumps(runs, indent=1))
        return
    rows = [[run["name"], _status(run), run["AP"], _age(run["age"]), run["registered"], run["folder"]] for run in runs]
    print_table(["name", "status", "AP", "age", "registered", "folder"], rows)


def _status(run: dict[str, Any]) -> str:
    if run["status"] == "RUNNING" and run["worked_on"] is False:
        return "RUNNING, but no command works on it"
    return str(run["status"])


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
