"""jobs/package.py: what travels with a job, and what of it is always the same."""

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jobs.package import code_files, pack
from pipeline.config.load import dump_config, load_config, parse_config

DEMO = Path("jobs/configs/demo.yaml")


def test_the_packages_and_the_configuration_travel(tmp_path: Path) -> None:
    config = load_config(DEMO, ["name=cells", "train.epochs=3"])
    package = pack(config)
    zipfile.ZipFile(io.BytesIO(package.archive)).extractall(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"jobs", "model", "pipeline", "cells.yaml"}
    assert load_config(tmp_path / "cells.yaml") == config
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".so", ".pyc") or path.name == "__pycache__"]
    command = [sys.executable, "-m", "jobs", "config", "-c", package.config_name]
    printed = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, check=True).stdout
    assert printed == (tmp_path / "cells.yaml").read_text()


def test_it_is_small_and_says_what_it_holds() -> None:
    package = pack(load_config(DEMO))
    assert len(package.archive) < 1_000_000
    assert sum(package.counts.values()) == len(code_files())
    assert str(package).endswith(f"pipeline ({package.counts['pipeline']} files) and demo.yaml")


def test_the_same_is_the_same_bytes() -> None:
    config = load_config(DEMO)
    assert pack(config) == pack(parse_config(dump_config(config), "again"))
    assert pack(config).archive != pack(load_config(DEMO, ["train.epochs=3"])).archive


def test_the_version_follows_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(DEMO)
    before = pack(config).code
    changed = {**code_files(), "jobs/cli.py": b"changed"}
    monkeypatch.setattr("jobs.package.code_files", lambda: changed)
    assert pack(config).code != before
    assert pack(config).code.split()[0] == before.split()[0]
