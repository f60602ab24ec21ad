"""`raydetr doctor` on a cluster of two nodes of which one has another version of a package."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.heads import PROJECT, RayHead, ray_head


def doctor(head: RayHead, *options: str) -> tuple[int, dict[str, list[dict[str, str]]]]:
    """The exit code and the findings by what they are about."""
    command = [sys.executable, "-m", "jobs", "doctor", "--address", head.cluster, "--json", *options]
    result = subprocess.run(command, cwd=PROJECT, env=head.environment, capture_output=True, text=True, check=False)
    found: dict[str, list[dict[str, str]]] = {}
    for finding in json.loads(result.stdout):
        found.setdefault(finding["what"], []).append(finding)
    return result.returncode, found


def test_a_node_with_another_version_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "webdataset-0.9.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: webdataset\nVersion: 0.9\n")
    with ray_head(tmp_path) as head:
        head.environment["PYTHONPATH"] = str(tmp_path)
        with head.node(tmp_path, cpus=1):
            del head.environment["PYTHONPATH"]
            code, found = doctor(head)
            while "2 nodes" not in found["ray cluster"][0]["detail"]:  # they take some seconds to begin
                time.sleep(1)
                code, found = doctor(head)
    assert code == 1
    here, *nodes = found["webdataset"]
    assert (here["state"], here["nodes"]) == ("ok", "")
    assert sorted(line["state"] for line in nodes) == ["ok", "wrong"]
    (wrong,) = (line["detail"] for line in nodes if line["state"] == "wrong")
    assert "0.9" in wrong
    assert found["torch"][1]["nodes"] == "all 2 nodes"
    assert [line["state"] for line in found["clock"]] == ["ok", "ok"]
    (link,) = found["link"]
    assert link["state"] == "ok"
    assert "GB/s" in link["detail"]


def test_a_place_that_a_node_does_not_see_and_a_store(tmp_path: Path) -> None:
    with ray_head(tmp_path) as head:
        places = ["--set", f"dataset.root={tmp_path}", "--set", "shards.out=http://127.0.0.1:1/shards"]
        for _ in range(20):
            _, found = doctor(head, "-c", "jobs/configs/demo.yaml", *places)
            if found["ray cluster"][0]["state"] == "ok":
                break
            time.sleep(1)
    assert [line["state"] for line in found["dataset.root"]] == ["ok", "ok"]
    assert [line["nodes"] != "" for line in found["shards.out"]] == [False, True]
    assert {line["state"] for line in found["shards.out"]} == {"missing"}
