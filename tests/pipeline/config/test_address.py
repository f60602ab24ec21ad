"""Addresses: what is secret in them is not shown, and SQLite's mean the file that was meant."""

from pathlib import Path

import pytest

from pipeline.config.address import credentials, for_client, shown, sqlite_path, sqlite_uri, without_secrets
from pipeline.config.load import ConfigError, dump_config, parse_config


@pytest.mark.parametrize(
    ("uri", "plain"),
    [
        ("http://mlflow:5000", "http://mlflow:5000"),
        ("http://user:p%40w@mlflow:5000/", "http://mlflow:5000"),
        ("https://us/er:p@w@mlflow/base?token=secret#x", "https://mlflow/base"),
        ("postgresql://user:pw@db/mlflow?password=pw", "postgresql://db/mlflow"),
    ],
)
def test_shown_without_secrets(uri: str, plain: str) -> None:
    assert shown(uri) == plain
    assert shown(plain) == plain
    assert without_secrets(f"no answer from '{uri}'") in (f"no answer from '{plain}'", f"no answer from '{plain}/'")


def test_credentials_go_to_the_client_apart() -> None:
    assert credentials("http://me:a%3Ab@host") == ("me", "a:b")
    assert credentials("http://host") is None
    assert for_client("http://me:a%3Ab@host") == "http://host"
    assert for_client("postgresql://me:pw@db/mlflow") == "postgresql://me:pw@db/mlflow"


@pytest.mark.parametrize("name", ["feature%2Fx", "q?x=y", "a#b", "sp ace", "50%", "ü:@!"])
def test_a_sqlite_address_means_its_file(tmp_path: Path, name: str) -> None:
    wanted = tmp_path / name / "mlflow.db"
    assert sqlite_path(sqlite_uri(wanted)) == wanted
    assert sqlite_path(shown(sqlite_uri(wanted))) == wanted
    wanted.parent.mkdir()
    for uri in (sqlite_uri(wanted), f"sqlite:///{wanted}"):
        assert sqlite_path(uri) == wanted
        assert shown(uri) == sqlite_uri(wanted)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        *(("register", "model_name", value) for value in ("a/b", "a:b", "it's", " ", "..", "x" * 300, "a\nb")),
        *(("tracking", "experiment", value) for value in ("", "  ", "x" * 501, "a\nb")),
    ],
)
def test_names_are_checked_when_the_config_loads(section: str, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"test: {section}\.{key}"):
        parse_config({"name": "run", section: {key: value}}, "test")


def test_the_dumped_config_holds_no_password() -> None:
    config = parse_config({"name": "run", "tracking": {"uri": "http://me:secret@host:1"}}, "test")
    assert dump_config(config)["tracking"]["uri"] == "http://host:1"
    assert config.tracking_uri == "http://me:secret@host:1"
