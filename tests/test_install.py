"""An install where no C++ compiler is found: everything works with plain torch's operator, and says so.

The environment is a fresh one that borrows every package but this project from the one that runs the tests. Nothing is
run in the project's folder, where an editable install leaves the extension.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest

from model import ops
from model.ops.operator import kernels
from tests.builders import make_annotation, make_varied_manifest, write_coco
from tests.pipeline.train.runs import MODEL, SETTINGS

PROJECT = Path(__file__).resolve().parents[1]
SOURCES = ["LICENSE", "README.md", "pyproject.toml", "setup.py", "csrc", "jobs", "model", "pipeline"]
OURS = ("__editable__", "_raydetr", "raydetr", "jobs", "model", "pipeline")

# Two forward passes of a small network; prints what ran and every warning about the operator.
FORWARD = """
import json, warnings
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    import torch
    import model
    from model import DetrConfig, ImageBatch, build_model, ops
    network = build_model(DetrConfig(backbone="resnet_tiny", backbone_norm="group_norm", hidden_dim=32, heads=4,
                                     encoder_layers=2, decoder_layers=2, ffn_dim=32, num_classes=3, num_queries=5))
    batch = ImageBatch(torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool))
    finite = all(bool(network(batch)["pred_boxes"].isfinite().all()) for _ in range(2))
told = [str(w.message) for w in caught if "attention operator" in str(w.message)]
print(json.dumps({"model": model.__file__, "compiled": ops.compiled(), "finite": finite, "warnings": told}))
"""


class Install(NamedTuple):
    """A virtual environment with the project in it."""

    folder: Path
    sources: Path
    """What it was built from, as in a fresh clone."""
    log: str
    """What pip printed."""

    @property
    def site_packages(self) -> Path:
        return site_packages_of(self.folder)

    def run(self, program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run one of its programs, which finds no other program."""
        return call([str(self.folder / "bin" / program), *arguments], self.folder / "bin", cwd)


def site_packages_of(environment: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))


def call(command: list[str], path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    named = ("CC", "CXX", "PYTHONPATH", "RAYDETR_CUDA", "RAY_ADDRESS")
    environment = {key: value for key, value in os.environ.items() if key not in named} | {"PATH": str(path)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=180, check=False)


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> Install:
    folder = tmp_path_factory.mktemp("install")
    environment, sources = folder / "venv", folder / "sources"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=60)
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if not package.name.startswith(OURS):
            (site_packages_of(environment) / package.name).symlink_to(package)
    sources.mkdir()
    for name in SOURCES:
        if (PROJECT / name).is_dir():
            shutil.copytree(PROJECT / name, sources / name)
        else:
            shutil.copy(PROJECT / name, sources / name)
    options = ["-v", "--no-index", "--no-build-isolation", "--no-deps", "--disable-pip-version-check"]
    python = environment / "bin" / "python"
    result = call([str(python), "-m", "pip", "install", *options, str(sources)], environment / "bin", folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return Install(environment, sources, result.stdout + result.stderr)


def test_the_build_warns_once(install: Install) -> None:
    _, _, building = install.log.partition("Running command Building wheel")
    assert building.count("Warning: no C++ compiler: the attention operator is not compiled") == 1


def test_nothing_compiled_is_installed(install: Install) -> None:
    (wheel,) = install.site_packages.glob("raydetr-*.dist-info/WHEEL")
    assert "Root-Is-Purelib: true" in wheel.read_text()
    assert "Tag: py3-none-any" in wheel.read_text()
    assert not list(install.site_packages.glob("_raydetr*"))
    assert (install.site_packages / "model" / "ops" / "reference.py").is_file()


def test_a_network_runs_with_one_warning(install: Install, tmp_path: Path) -> None:
    result = install.run("python", "-c", FORWARD, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["model"].startswith(str(install.site_packages))
    assert not told["compiled"]
    assert told["finite"]
    (warning,) = told["warnings"]
    assert "plain torch" in warning
    assert "it was not built" in warning


def test_a_report_finds_its_templates(install: Install, tmp_path: Path) -> None:
    files = write_coco(tmp_path, [1], [make_annotation(1, 1)])
    (tmp_path / "found.json").write_text("[]")
    words = ["--annotations", str(files.annotations), "--detections", "found.json", "--images", str(files.images)]
    result = install.run("raydetr", "report", *words, cwd=tmp_path)
    assert result.stdout == "report.html: open it in a browser\n", result.stderr
    assert (tmp_path / "report.html").is_file()


def test_doctor_says_so(install: Install, tmp_path: Path) -> None:
    result = install.run("raydetr", "doctor", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (finding,) = (finding for finding in json.loads(result.stdout) if "operator" in finding["what"])
    assert finding["state"] == "note"
    assert "plain torch" in finding["detail"]
    assert "install a C++ compiler" in finding["detail"]


def test_training_refuses_where_the_operator_is_required(install: Install, tmp_path: Path) -> None:
    manifest = make_varied_manifest(tmp_path / "data", 8)
    config = {
        "name": "refused",
        "runs": str(tmp_path),
        "shards": {"out": str(manifest.folder.parent)},
        "model": MODEL,
        "train": {**SETTINGS, "max_steps": 1},
        "cluster": {"workers": 1, "device": "cpu"},
    }
    (tmp_path / "refused.yaml").write_text(json.dumps(config))
    result = install.run("raydetr", "train", "-c", "refused.yaml", cwd=tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    *told, line = result.stderr.splitlines()
    assert [text.split(maxsplit=1)[1] for text in told] == ["starting Ray on this machine"]
    assert line.startswith("error: cluster.require_compiled is true, and there is no compiled attention operator for")


@pytest.mark.skipif(not ops.compiled(), reason="the operator is not compiled here")
def test_an_installed_extension_serves_the_packages_of_the_working_directory(install: Install) -> None:
    """As in a Ray job: the extension is in site-packages, and the job's `model` beside it is not used."""
    assert kernels is not None
    extension = Path(kernels.EXTENSION.__file__)
    installed = install.site_packages / extension.name
    installed.symlink_to(extension)
    try:
        result = install.run("python", "-c", FORWARD, cwd=install.sources)
    finally:
        installed.unlink()
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["model"] == str(install.sources / "model" / "__init__.py")
    assert told["compiled"]
    assert told["warnings"] == []
