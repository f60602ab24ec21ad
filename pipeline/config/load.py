"""Reads a pipeline's YAML, applies overrides, and explains what is wrong with it.

`load_config(path, ["train.epochs=3"])`: every problem is a `ConfigError` that names the file, the key and the mend.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config.address import without_secrets
from pipeline.config.keys import keys_at, with_keys
from pipeline.config.sections import Config
from pipeline.errors import UserError


class ConfigError(UserError):
    """A configuration that cannot be used."""


def load_config(path: Path | str, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file and apply `section.key=value` overrides (values are YAML).

    Raises ConfigError naming the file, the key and the mend for anything that is not a valid configuration.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file with -c") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold sections such as `train:`, not {type(data).__name__}")
    for override in overrides:
        _apply_override(data, override)
    return parse_config(data, str(path))


def parse_config(data: Mapping[str, Any], source: str) -> Config:
    """Check a plain mapping; `source` names it in errors."""
    if isinstance(data.get("model"), Mapping) and "num_classes" in data["model"]:
        raise ConfigError(f"{source}: model.num_classes follows from dataset.labels and the categories; remove it")
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        lines = [_explain(dict(problem)) for problem in error.errors(include_url=False)]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def dump_config(config: Config) -> dict[str, Any]:
    """The whole configuration as plain values, but for the secrets in an address; `parse_config` takes it back."""
    data = config.model_dump(mode="json", by_alias=True)
    if config.tracking.uri is not None:
        data["tracking"]["uri"] = without_secrets(config.tracking.uri)
    del data["model"]["num_classes"]
    return data


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override}: write section.key=value, for example --set train.epochs=10")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {' '.join(str(error).split())}") from error
    target = data
    for part in parts[:-1]:
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override}: {part} is a value, not a section")
    target[parts[-1]] = value


def _explain(problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        close = difflib.get_close_matches(location[-1], keys_at(location[:-1]), n=1, cutoff=0.5)
        hint = f"did you mean `{'.'.join([*location[:-1], close[0]])}`?" if close else "see `raydetr config`"
        return f"unknown key `{key}`; {hint}"
    if problem["type"] == "missing":
        return f"`{key}` is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return _with_own_keys(message, location) if location else message
    return f"`{key}` is {problem['input']!r}: {message}"


def _with_own_keys(message: str, location: list[str]) -> str:
    """What a section says of its settings, beginning with the key that it is about."""
    key = ".".join(location)
    message = with_keys(message, key)
    if message.split()[0] in keys_at(location):
        return f"{key}.{message}"
    return message if message.startswith(key) else f"{key}: {message}"
