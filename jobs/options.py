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

Over = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SECTION.KEY=VALUE,VALUE",
        help="A setting of train or model and its values; LEAST..MOST is drawn from. May be repeated.",
    ),
]
Search = Literal["grid", "random", "asha"]
"""How a sweep chooses its trials, and whether it ends some."""
HowToSearch = Annotated[
    Search | None,
    typer.Option(
        "--search",
        help="All combinations; drawn ones; either of them, of which ASHA stops the worse ones early.",
        show_default="grid",
    ),
]
Trials = Annotated[int | None, typer.Option(min=1, help="Trials that are drawn, for random and asha.")]
AtOnce = Annotated[int | None, typer.Option(min=1, help="Trials at the same time; else as many as there is room for.")]

Submitted = Literal["run", "shard", "train", "evaluate", "sweep"]
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
