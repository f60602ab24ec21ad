"""infra/: what can be seen of it without a cluster, a container or the network."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from jobs.cli import app

PROJECT = Path(__file__).resolve().parents[1]
INFRA = PROJECT / "infra"
MANIFESTS = sorted(INFRA.rglob("*.y*ml"))
TEXTS = [*MANIFESTS, *INFRA.rglob("*.sbatch"), *INFRA.rglob("*.md"), *INFRA.rglob("Dockerfile"), PROJECT / "README.md"]


def name_of(path: Path) -> str:
    return str(path.relative_to(PROJECT))


def values(node: Any, key: str) -> Iterator[Any]:
    """Whatever stands under a key, anywhere."""
    for each in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from values(each, key)
    if isinstance(node, dict) and key in node:
        yield node[key]


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_manifests_are_yaml(path: Path) -> None:
    assert all(isinstance(each, dict) for each in yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_images_are_pinned(path: Path) -> None:
    tags = {}
    for each in yaml.safe_load_all((INFRA / "kuberay" / "base" / "kustomization.yaml").read_text()):
        tags = {image["name"]: image["newTag"] for image in each["images"]}
    for document in yaml.safe_load_all(path.read_text()):
        for image in values(document, "image"):
            tag = tags.get(image, image.rpartition(":")[2])
            assert re.match(r"v?\d+\.\d+", tag) or re.match(r"\$\{\w+:-[^}]*:\d", image), image


def test_the_bases_of_the_image_are_pinned() -> None:
    text = (INFRA / "docker" / "Dockerfile").read_text()
    bases = re.findall(r"^ARG (?:BASE|CUDA)=(\S+)", text, re.MULTILINE)
    assert len(bases) == 2
    assert all(":" in base and not base.endswith(":latest") for base in bases)


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_commands_are_known(path: Path) -> None:
    """Behind `raydetr` (not as the namespace, `-n raydetr`) and `python -m jobs` stands a command that there is."""
    known = {*typer.main.get_command(app).commands, "--help", "--version"}
    found = re.findall(
        r"(?:python -m jobs|(?:^|[`/]|(?<!-n) )raydetr\"?) (\w[\w-]*|--\w+)\b(?! [A-Z])", path.read_text(), re.MULTILINE
    )
    wrong = {word for word in found if word not in known}
    assert not wrong


def test_the_script_for_slurm_is_bash() -> None:
    script = INFRA / "slurm" / "raydetr.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


def test_the_build_of_an_image_is_sent_what_it_copies() -> None:
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", (INFRA / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    sent = {line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name in {name for line in copied for name in line.split()}:
        assert (PROJECT / name).exists(), name
        assert name.partition("/")[0] in sent, name


class TestMonitoring:
    FOLDER = INFRA / "monitoring"

    def test_rules_look_at_what_there_is(self) -> None:
        made = set(re.findall(r'"(raydetr_\w+)"', (PROJECT / "jobs" / "metrics.py").read_text()))
        (group,) = yaml.safe_load((self.FOLDER / "rules.yml").read_text())["groups"]
        looked_at = {name for rule in group["rules"] for name in re.findall(r"ray_(raydetr_\w+)", rule["expr"])}
        assert looked_at
        assert looked_at <= made

    @pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool: not here (Debian: prometheus)")
    def test_rules_fire_when_they_should(self) -> None:
        for words in (("check", "config", "prometheus.yml"), ("test", "rules", "rules_test.yml")):
            result = subprocess.run(["promtool", *words], cwd=self.FOLDER, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stdout + result.stderr
