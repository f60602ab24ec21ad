"""Options that commands share."""

from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from pipeline.errors import UserError

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The pipeline's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the file; may be repeated."),
]

Submitted = Literal["run", "shard", "train", "evaluate"]
"""The commands that a job on a cluster may run."""

Step = Literal["shard", "train", "evaluate", "register"]
"""What a pipeline does."""
STEPS: tuple[Step, ...] = get_args(Step)
"""In their order."""


def steps_between(first: Step, last: Step) -> tuple[Step, ...]:
    """The steps from `first` to `last`.

    Raises:
        UserError: `last` comes before `first`.
    """
    steps = STEPS[STEPS.index(first) : STEPS.index(last) + 1]
    if not steps:
        raise UserError(f"--from {first} --until {last}: the steps are {', '.join(STEPS)}, in this order")
    return steps
