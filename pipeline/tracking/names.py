"""What MLflow takes for the name of a metric, a param or a tag, and legal names for those that it does not take."""

import hashlib
from collections.abc import Iterable, Mapping

LENGTH = 250
"""Most characters of a name that MLflow takes."""


def metric_name(name: str) -> str:
    """Return a metric's name with what MLflow refuses in it replaced by underscores.

    Letters, digits and `_-./ ` stay. MLflow reads names as paths: a part that is empty, `.` or `..` is refused, too.
    """
    letters = "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in name)
    parts = ["_" * max(1, len(part)) if part in ("", ".", "..") else part for part in letters.split("/")]
    whole = "/".join(parts)
    return whole if len(whole) <= LENGTH else _marked(whole, name)


def legal_names(names: Iterable[str], known: Mapping[str, str]) -> dict[str, str]:
    """Legal names for new ones, none of them twice: `{name: legal}` without those that are known.

    Args:
        names: whatever they are; those that are legal keep themselves.
        known: the names that were given before.
    """
    new = [name for name in dict.fromkeys(names) if name not in known]
    taken, made = set(known.values()), {}
    for name in sorted(new, key=lambda name: metric_name(name) != name):  # the legal ones first, others as they come
        legal = metric_name(name)
        if legal in taken:
            legal = _marked(legal, name)
        taken.add(legal)
        made[name] = legal
    return made


def _marked(legal: str, name: str) -> str:
    """A legal name with a mark of the one that it stands for."""
    mark = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{legal[: LENGTH - len(mark) - 1]}-{mark}"
