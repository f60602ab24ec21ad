"""Trains with several settings, trial by trial: the command, and the table that it ends with."""

import contextlib
import json
import sys
from typing import Any

import typer

from jobs.console import make_console, print_table
from jobs.models import AsJson
from jobs.options import AtOnce, ConfigFile, HowToSearch, Over, Overrides, Trials


def sweep(
    config: ConfigFile,
    overrides: Overrides = None,
    over: Over = None,
    search: HowToSearch = None,
    trials: Trials = None,
    at_once: AtOnce = None,
    as_json: AsJson = False,
) -> None:
    """Train with several settings, compare the trials by validation AP, and register the best.

    The same command goes on where one stood: trials that are done are not run again.
    """
    from jobs.trials import plan_sweep

    planned = plan_sweep(config, overrides or (), over or (), search or "grid", trials)
    from jobs.tuning import run_sweep

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = run_sweep(planned, at_once)
    typer.echo(json.dumps(result, indent=1)) if as_json else print_sweep(result)
    if failed := [row["trial"] for row in result["trials"] if row["state"] == "failed"]:
        sys.stderr.write(f"error: {', '.join(failed)} failed; the same command tries again\n")
        raise typer.Exit(1)


def print_sweep(result: dict[str, Any]) -> None:
    """Print the table, and where all is."""
    rows = result["trials"]
    print_table(list(rows[0]), [[_short(value) for value in row.values()] for row in rows])
    registered = result["registered"] or "refused by the tracking server"
    for what, value in (("best", result["best"]), ("registered", registered), ("plot", result["plot"])):
        make_console().print(f"{what:<12} {value}")
    make_console().print(f"MLflow page  {result['page']}")


def _short(value: Any) -> Any:
    """Learning rates are not to be rounded to four digits behind the point."""
    return f"{value:.4g}" if isinstance(value, float) and 0 < abs(value) < 0.1 else value
