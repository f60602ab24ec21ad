"""What infra/compose/compose.yml and the dashboard beside it say."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parents[1]
FOLDER = PROJECT / "infra" / "compose"


def composition() -> dict[str, Any]:
    """The whole file with the values that it has where none is given, less what only its own anchors name."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (FOLDER / "compose.yml").read_text())
    return {key: value for key, value in yaml.safe_load(text).items() if not key.startswith("x-")}


def queries(run: str) -> list[str]:
    """What the dashboard asks for a run."""
    panels = json.loads((PROJECT / "infra" / "monitoring" / "dashboard.json").read_text())["panels"]
    return [target["expr"].replace("$run", run) for panel in panels for target in panel["targets"]]
