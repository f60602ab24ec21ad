"""Addresses of tracking servers: shown without what is secret in them, and the file that a SQLite one means."""

import re
from pathlib import Path
from urllib.parse import quote, unquote

SQLITE = "sqlite:///"
HTTP = ("http://", "https://")

_USER_INFO = re.compile(r"(?<=://)[^\s'\"]*@")
_QUERY = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s?'\"]*)\?[^\s'\"]*", re.IGNORECASE)


def shown(uri: str) -> str:
    """An address as anyone may read it: without user, password and query; a SQLite file's always in the same form."""
    if uri.startswith(SQLITE):
        return sqlite_uri(sqlite_path(uri))
    plain = without_secrets(uri)
    return plain.partition("#")[0].rstrip("/") if plain.startswith(HTTP) else plain


def without_secrets(text: str) -> str:
    """A text with the users, passwords and queries of the addresses in it taken out."""
    return _QUERY.sub(r"\1", _USER_INFO.sub("", text))


def credentials(uri: str) -> tuple[str, str] | None:
    """User and password that stand in an http(s) address, or None."""
    user_info, at, _ = uri.partition("://")[2].rpartition("@")
    if not (uri.startswith(HTTP) and at):
        return None
    user, _, password = user_info.partition(":")
    return unquote(user), unquote(password)


def for_client(uri: str) -> str:
    """The address for MLflow's client: what is shown, but for databases, whose password has no other way."""
    return shown(uri) if uri.startswith((SQLITE, *HTTP)) else uri


def sqlite_uri(path: Path) -> str:
    """The address of a SQLite file, whatever stands in its path."""
    return SQLITE + quote(str(path.resolve()))


def sqlite_path(uri: str) -> Path:
    """The file that a `sqlite:///` address means: the decoded path, or as written where only that has its folder."""
    text = uri.removeprefix(SQLITE)
    path, _, query = text.partition("?")
    written = Path(text if "/" in query else path)  # what comes after the file has no folders
    decoded = Path(unquote(path))
    is_literal = "/" in query or (written.parent.is_dir() and not decoded.parent.is_dir())
    return (written if is_literal else decoded).resolve()
