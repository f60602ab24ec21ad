"""What travels with a submitted job: the packages as they are here and the configuration, in one small archive."""

import hashlib
import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import yaml

from jobs.cluster import HOME, PACKAGES
from pipeline.config.load import dump_config
from pipeline.config.sections import Config
from pipeline.tracking.provenance import code_version

_LEFT_OUT = ("__pycache__", ".so", ".pyc")
_DATE = (1980, 1, 1, 0, 0, 0)  # the same files are the same bytes, which Ray then uploads once


class Package(NamedTuple):
    """An archive and what is in it."""

    archive: bytes
    """A zip file."""
    config_name: str
    """The configuration's file in it."""
    counts: dict[str, int]
    """Files of each package."""
    code: str
    """Which version of the packages: the project's, git's commit where there is one, and a digest of the files."""

    def __str__(self) -> str:
        listed = ", ".join(f"{name} ({count} files)" for name, count in self.counts.items())
        return f"{len(self.archive) / 1000:.0f} kB: {listed} and {self.config_name}"


def pack(config: Config) -> Package:
    """The packages that this process runs, without what is compiled, and the whole configuration."""
    files = code_files()
    config_name = f"{config.name}.yaml"
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            _add(archive, name, data)
        _add(archive, config_name, yaml.safe_dump(dump_config(config), sort_keys=False).encode())
    counts: dict[str, int] = {}
    for name in files:
        package = name.partition("/")[0]
        counts[package] = counts.get(package, 0) + 1
    return Package(content.getvalue(), config_name, counts, _version(files))


def code_files() -> dict[str, bytes]:
    """The files of the packages by their names below HOME."""
    found = {}
    for package in map(Path, PACKAGES):
        for path in sorted(package.rglob("*")):
            if path.is_file() and not any(
                str(path.relative_to(HOME)).endswith(end) or end in path.parts for end in _LEFT_OUT
            ):
                found[path.relative_to(HOME).as_posix()] = path.read_bytes()
    return found


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    entry = zipfile.ZipInfo(name, _DATE)
    entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
    archive.writestr(entry, data)


def _version(files: dict[str, bytes]) -> str:
    sums = hashlib.sha256()
    for name, data in files.items():
        sums.update(f"{name}\0{len(data)}\0".encode() + data)
    code = code_version()
    commit = code.get("git_commit", "")[:12] + ("-dirty" if code.get("git_dirty") == "true" else "")
    words = [code["version"], commit, f"sha256:{sums.hexdigest()[:12]}"]
    return " ".join(word for word in words if word)
