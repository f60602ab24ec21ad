"""Which Python a submitted job's entry point runs with: the one that the cluster's own processes run with.

Ray runs an entry point in a shell with the environment of the head, whose `python` is the system's where the head was
started by the full path of `ray`. This module is imported by the job's supervisor, so by the interpreter wanted.
"""

import os
import shlex
import sys

VARIABLE = "RAYDETR_PYTHON"
HOOK = "jobs.interpreter.name_interpreter"
"""What Ray's processes call when they start, in an environment that names it."""


def name_interpreter() -> None:
    """Name this process's interpreter in its environment, which an entry point inherits."""
    os.environ[VARIABLE] = sys.executable


def entry_point(*arguments: str) -> str:
    """The shell's line for `python ARGUMENTS`, by the cluster's interpreter where `HOOK` was called before."""
    return f'exec "${{{VARIABLE}:-python3}}" {shlex.join(arguments)}'
