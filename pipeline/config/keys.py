"""The keys of the configuration: which there are, and messages that name settings by their whole keys."""

import re
from dataclasses import fields, is_dataclass
from typing import Any, get_args

from pydantic import BaseModel

from model.config import DetrConfig
from pipeline.config.sections import Config


def with_keys(message: str, *sections: str) -> str:
    """`message` with the settings of sections that it names, as in `heads: 8` or `heads 8`, under their whole keys."""
    for section in sections:
        if names := "|".join(keys_at(section.split("."))):
            message = re.sub(rf"(?<![\w./-])({names})(?=: | \d)", rf"{section}.\1", message)
    return message


def keys_at(location: list[str]) -> list[str]:
    """The keys that a section takes."""
    section: Any = Config
    for part in location:
        section = _section_type(_fields(section).get(part))
    return [key for key in _fields(section) if not (section is DetrConfig and key == "num_classes")]


def _fields(section: Any) -> dict[str, Any]:
    if is_dataclass(section):
        return {field.name: field.type for field in fields(section)}
    if isinstance(section, type) and issubclass(section, BaseModel):
        return {field.alias or name: field.annotation for name, field in section.model_fields.items()}
    return {}


def _section_type(annotation: Any) -> Any:
    """The section class in `Section | None`."""
    return next((kind for kind in get_args(annotation) if kind is not type(None)), annotation)
