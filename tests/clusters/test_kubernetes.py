"""infra/kuberay: what kustomize makes of each overlay, against the schemas of Kubernetes and of KubeRay's kinds.

No cluster: whether it is admitted, scheduled and given its GPUs cannot be seen here. `KUBECTL` names the program
where it is not in the path, and kubernetes-validate is a package of PyPI.
"""

import copy
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.end_to_end.test_pipeline import PROJECT

KUBERAY = PROJECT / "infra" / "kuberay"
OVERLAYS = sorted(path.name for path in (KUBERAY / "overlays").iterdir())
KUBECTL = os.environ.get("KUBECTL") or shutil.which("kubectl")
needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="kubectl: not here; name it in KUBECTL")


def rendered(overlay: str) -> list[dict[str, Any]]:
    command = [str(KUBECTL), "kustomize", str(KUBERAY / "overlays" / overlay)]
    return list(yaml.safe_load_all(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def of_kind(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [each for each in objects if each["kind"] == kind]


@pytest.fixture(scope="module")
def schemas(shared_data: Path) -> dict[str, Any]:
    """The schema of each of KubeRay's kinds, with unknown fields refused."""
    found = {}
    for path in (shared_data / "kuberay").glob("crd_*.yaml"):
        definition = yaml.safe_load(path.read_text())["spec"]
        (version,) = (each for each in definition["versions"] if each["name"] == "v1")
        found[definition["names"]["kind"]] = strict(version["schema"]["openAPIV3Schema"])
    return found


def strict(schema: Any) -> Any:
    """A schema in which objects that list properties have no others; metadata is Kubernetes' own."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in copy.copy(schema).items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    return made


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
class TestOverlays:
    def test_are_kubernetes(self, overlay: str) -> None:
        validate = pytest.importorskip("kubernetes_validate")
        plain = [each for each in rendered(overlay) if not each["apiVersion"].startswith("ray.io/")]
        assert {each["kind"] for each in plain} >= {"Namespace", "PersistentVolumeClaim", "Deployment", "NetworkPolicy"}
        for each in plain:
            validate.validate(each, "1.34", strict=True)

    def test_are_kuberays(self, overlay: str, schemas: dict[str, Any]) -> None:
        (cluster,) = of_kind(rendered(overlay), "RayCluster")
        jsonschema.validate(cluster, schemas["RayCluster"])

    def test_pods_are_restricted_and_from_this_image(self, overlay: str) -> None:
        objects = rendered(overlay)
        assert (
            of_kind(objects, "Namespace")[0]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
        )
        (cluster,), (mlflow,) = of_kind(objects, "RayCluster"), of_kind(objects, "Deployment")
        head, workers = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"][0]
        for pod in (head["template"]["spec"], workers["template"]["spec"], mlflow["spec"]["template"]["spec"]):
            assert pod["securityContext"]["runAsNonRoot"]
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            (container,) = pod["containers"]
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["image"] == f"raydetr:0.1.0-{'cuda' if overlay in ('gpu', 'spot') else 'cpu'}"
        assert cluster["spec"]["authOptions"] == {"mode": "token"}


@needs_kubectl
def test_what_an_overlay_is_for_is_in_it() -> None:
    def spec(overlay: str) -> Any:
        return of_kind(rendered(overlay), "RayCluster")[0]["spec"]

    pod = spec("spot")["workerGroupSpecs"][0]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["terminationGracePeriodSeconds"] == 30
    assert [each["key"] for each in pod["tolerations"]] == ["nvidia.com/gpu", "raydetr/spot"]
    assert spec("gcs-fault-tolerance")["gcsFaultToleranceOptions"]["backend"] == "rocksdb"
    assert "gcsFaultToleranceOptions" not in spec("cpu")


def test_the_job_is_kuberays(schemas: dict[str, Any]) -> None:
    jsonschema.validate(yaml.safe_load((KUBERAY / "rayjob.yaml").read_text()), schemas["RayJob"])


def test_unknown_fields_are_refused(schemas: dict[str, Any]) -> None:
    cluster = yaml.safe_load((KUBERAY / "base" / "raycluster.yaml").read_text())
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["container"] = []
    with pytest.raises(jsonschema.ValidationError, match="'container' was unexpected"):
        jsonschema.validate(cluster, schemas["RayCluster"])
