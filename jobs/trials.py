"""The trials of a sweep: the settings of each, what is known of it on the disk, and the table that they come to.

Each trial is a run as any other, <runs>/<name>-sweep-<n>. In the sweep's own folder, <runs>/<name>-sweep, `sweep.json`
is what was asked for, `trials/<n>.json` what a trial came to, once it is done, `trials/<n>.log` what it said, and the
table is `trials.csv`.
"""

import csv
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jobs.options import Search
from pipeline.config.load import ConfigError, dump_config, load_config
from pipeline.config.sections import Config, EvaluateSection, Role, TrainSection, settings_with
from pipeline.config.values import differences, digest
from pipeline.errors import UserError
from pipeline.files import read_json, write_json, write_whole

SECTIONS = ("train", "model")
"""Whose settings may differ between trials."""
TRIES = 1000
"""Draws for each trial that is wanted, before there are said to be too few that differ."""

_RANGE = re.compile(r"([-+.\deE]+?)\.\.([-+.\deE]+)")

Draw = Callable[[random.Random], Any]


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    number: int
    """From 1."""
    settings: dict[str, Any]
    """The values of the keys in which trials differ."""
    config: Config
    """Of the whole run."""

    def __str__(self) -> str:
        return f"{self.config.name} ({', '.join(f'{key} {_cell(value)}' for key, value in self.settings.items())})"

    @property
    def schedule(self) -> list[int | None]:
        """What makes a trial longer that was done."""
        return [self.config.train.epochs, self.config.train.max_steps]


@dataclass(frozen=True)
class Sweep:
    """What is tried."""

    config: Config
    """Of the sweep itself: what its trials share."""
    asked: dict[str, Any]
    """What the command said: "over", "search" and "trials"."""
    trials: list[Trial]

    @property
    def file(self) -> Path:
        """Remembers the sweep."""
        return self.config.folder.path / "sweep.json"

    @property
    def metric(self) -> str:
        """By which trials are compared."""
        return self.config.register_.metric

    def record(self, trial: Trial) -> Path:
        """File of what a trial came to."""
        return self.config.folder.path / "trials" / f"{trial.number}.json"

    def log(self, trial: Trial) -> Path:
        """File of what a trial says."""
        return self.record(trial).with_suffix(".log")

    def found(self, trial: Trial) -> dict[str, Any]:
        """What a trial came to; empty where that is not known."""
        file = self.record(trial)
        return dict(read_json(file, "record of a trial")) if file.exists() else {}

    def is_done(self, trial: Trial) -> bool:
        """Whether a trial was scored at the end of its schedule, or where it was stopped."""
        found = self.found(trial)
        return "metrics" in found and found["schedule"] == trial.schedule

    def check_begun(self) -> None:
        """Remember the sweep.

        Raises:
            UserError: the folder is another sweep's.
        """
        content = {"asked": self.asked, "config": _shared(self.config)}
        if self.file.exists():
            begun = read_json(self.file, "record of a sweep")
            if changed := differences({key: begun.get(key, {}) for key in content}, content):
                names = "; ".join(line.removeprefix("asked.").removeprefix("config.") for line in changed)
                raise UserError(
                    f"{self.file}: the sweep was begun with other settings ({names}): use another name (--set name=...)"
                    f", or delete {self.config.folder} and the folders of its trials to begin anew"
                )
        write_json(self.file, content | {"trials": [trial.settings for trial in self.trials]})

    def rows(self) -> list[dict[str, Any]]:
        """What came of each trial, the best first."""
        rows = []
        for trial in self.trials:
            found = self.found(trial)
            scores = {name: found.get("metrics", {}).get(name) for name in dict.fromkeys((self.metric, "AP", "AP50"))}
            told = {key: found.get(key) for key in ("epochs", "state", "checkpoint")}
            rows.append({"trial": trial.config.name, **trial.settings, **scores, **told})
        return sorted(rows, key=lambda row: -math.inf if row[self.metric] is None else row[self.metric], reverse=True)

    def best(self) -> Trial | None:
        """The best trial by now; of equal ones the first."""
        done = {trial.config.name: trial for trial in self.trials if "metrics" in self.found(trial)}
        return done[self.rows()[0]["trial"]] if done else None


def sweep_name(config: Config) -> str:
    """Name of the sweep of a pipeline, as of a run."""
    return f"{config.name}-sweep"


def plan_sweep(
    file: Path, overrides: Sequence[str], over: Sequence[str], search: Search, trials: int | None = None
) -> Sweep:
    """What a command asks for.

    Args:
        file: the pipeline's YAML.
        overrides: `section.key=value`, of all trials.
        over: `section.key=value,value` or, where trials are drawn, `section.key=least..most`.
        search: all combinations of the values; as many drawn ones as `trials`; or `asha`, either of the two.
        trials: how many are drawn.

    Raises:
        UserError: what is wrong with it.
    """
    base = load_config(file, overrides)
    ways = _read_over(over)
    if search == "grid" and trials is not None:
        raise UserError("--trials is for drawn trials: give --search random or asha with it")
    if search == "random" and trials is None:
        raise UserError("--search random draws trials: say how many with --trials")
    if search == "asha" and not base.evaluate.beside:
        raise UserError("--search asha looks at the scores of evaluate.beside, which is false: mend one")
    name = sweep_name(base)
    config = load_config(file, [*overrides, f"name={json.dumps(name)}"])
    made: list[Trial] = []
    for number, settings in enumerate(_choose(ways, trials, base.train.seed), 1):
        changes = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        try:
            own = load_config(file, [*overrides, *changes, f'name="{name}-{number}"'])
        except ConfigError as error:
            told = " ".join(f"--over {key}={_cell(value)}" for key, value in settings.items())
            raise UserError(f"{told}: {error}") from None
        made.append(Trial(number, {key: _value(own, key) for key in settings}, own))
    first: dict[str, Trial] = {}
    for trial in made:
        other = first.setdefault(digest(trial.settings), trial)
        if other is not trial:
            raise UserError(f"--over: the trials {other} and {trial.number} are the same: name each value once")
    return Sweep(
        config, {"over": dict(sorted(_split(each) for each in over)), "search": search, "trials": trials}, made
    )


def _split(over: str) -> tuple[str, str]:
    key, _, text = over.partition("=")
    return key.strip(), text.strip()


def _read_over(over: Sequence[str]) -> dict[str, list[Any] | Draw]:
    """The values of each key, or how one is drawn."""
    ways: dict[str, list[Any] | Draw] = {}
    if not over:
        raise UserError("give the settings that differ: --over train.lr=1e-4,2e-4")
    for each in over:
        key, text = _split(each)
        section, dot, setting = key.partition(".")
        if section not in SECTIONS or not (dot and setting):
            raise UserError(
                f"--over {each}: trials differ in settings of train and model, such as train.lr; --set changes what "
                "they share"
            )
        if key in ways:
            raise UserError(f"--over {each}: {key} is given twice: name all its values in one --over")
        ways[key] = _values(each, text)
    return ways


def _values(over: str, text: str) -> list[Any] | Draw:
    if bounds := _RANGE.fullmatch(text):
        return _range(over, *bounds.groups())
    try:
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError as error:
        raise UserError(f"--over {over}: the values are not YAML: {' '.join(str(error).split())}") from error
    if not values:
        raise UserError(f"--over {over}: there are no values: write section.key=value,value")
    return list(values)


def _range(over: str, least: str, most: str) -> Draw:
    try:
        low, high = float(least), float(most)
    except ValueError:
        raise UserError(f"--over {over}: a range is two numbers, such as 1e-5..1e-3") from None
    if not -math.inf < low < high < math.inf:
        raise UserError(f"--over {over}: the first number of a range must be less than the second")
    if least.isdigit() and most.isdigit():
        return lambda generator: generator.randint(int(least), int(most))
    if low > 0:
        return lambda generator: float(f"{math.exp(generator.uniform(math.log(low), math.log(high))):.3g}")
    return lambda generator: float(f"{generator.uniform(low, high):.3g}")


def _choose(ways: dict[str, list[Any] | Draw], trials: int | None, seed: int) -> list[dict[str, Any]]:
    """The settings of each trial: all combinations, or so many that are drawn."""
    if trials is None:
        lists = {key: values for key, values in ways.items() if isinstance(values, list)}
        if drawn := ways.keys() - lists.keys():
            raise UserError(f"--over {min(drawn)}: a range is drawn from: give --search random or asha, and --trials")
        return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    generator = random.Random(seed)
    chosen: dict[str, dict[str, Any]] = {}
    for _ in range(TRIES * trials):
        values = {key: generator.choice(way) if isinstance(way, list) else way(generator) for key, way in ways.items()}
        chosen.setdefault(digest(values), values)
        if len(chosen) == trials:
            return list(chosen.values())
    raise UserError(f"--trials {trials}: --over has only {len(chosen)} different trials: ask for fewer, or name more")


def _value(config: Config, key: str) -> Any:
    """A setting as the configuration has it, whatever it was written as."""
    value: Any = dump_config(config)
    for part in key.split("."):
        value = value[part]
    return value


def _shared(config: Config) -> dict[str, Any]:
    """The settings without which the trials that are done would be other ones; `runs` alone may be in their place."""
    data = dump_config(config)
    for name in settings_with(TrainSection, Role.MAY_DIFFER):
        del data["train"][name]
    data["evaluate"] = {name: data["evaluate"][name] for name in settings_with(EvaluateSection, Role.SCORES)}
    data["register"] = {name: data["register"][name] for name in ("metric", "which")}
    return {name: data[name] for name in ("dataset", "shards", "model", "train", "evaluate", "register")}


def write_results(sweep: Sweep) -> tuple[Path, Path]:
    """Write the table, and the configuration of the best trial; returns the two files."""
    best, folder = sweep.best(), sweep.config.folder.path
    assert best is not None, "there is something to write when a trial is done"
    rows, table, chosen = sweep.rows(), folder / "trials.csv", folder / "best.yaml"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    head = (
        f"# The best of {len(rows)} trials, {sweep.metric} {rows[0][sweep.metric]:.4f}: raydetr run -c {chosen.name}\n"
    )
    settings = yaml.safe_dump(dump_config(best.config), sort_keys=False, allow_unicode=True)
    write_whole(chosen, (head + settings).encode())
    return table, chosen


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)
