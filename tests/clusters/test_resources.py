"""Steps on a cluster whose nodes have resources of their own: each runs where `cluster.resources` asks for."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.test_pipeline import PROJECT, SMALL
from tests.heads import RayHead, ray_head

WHERE = """
import json, sys
import ray
from ray.util.state import list_actors, list_tasks
ray.init(address=sys.argv[1], log_to_driver=False)
nodes = {node["NodeID"]: "head" if "plain" in node["Resources"] else "node" for node in ray.nodes()}
tasks = [(task.job_id, task.name, nodes.get(task.node_id)) for task in list_tasks(address=sys.argv[2], limit=10000)]
actors = [(actor.job_id, actor.class_name, nodes.get(actor.node_id)) for actor in list_actors(address=sys.argv[2])]
print(json.dumps(tasks + actors))
"""
ROOM = """
import sys
from jobs.cluster import connected
from jobs.room import is_free, room
from pipeline.config.sections import ClusterSection
with connected(ClusterSection(address=sys.argv[1])):
    for need in ({"CPU": 1, "fast": 0.25}, {"CPU": 1, "plain": 1}, {"CPU": 1, "plain": 0.1, "fast": 0.1}):
        print(room(need), is_free(need))
"""
NODES = "import ray, sys; ray.init(address=sys.argv[1]); print(ray.cluster_resources().get('fast'))"


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    """A head with one resource, and a node with another."""
    folder = tmp_path_factory.mktemp("head")
    with ray_head(folder, plain=1) as head, head.node(folder, 2, fast=1):
        while asked(head, NODES, head.cluster).strip() != "1.0":
            time.sleep(1)
        yield head


def asked(head: RayHead, program: str, *words: str) -> str:
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(
        command, cwd=PROJECT, env=head.environment, capture_output=True, text=True, timeout=120, check=False
    )
    return done.stdout


def raydetr(
    head: RayHead, folder: Path, step: str, resources: str, **extra: object
) -> subprocess.CompletedProcess[str]:
    settings = {
        **SMALL,
        "runs": folder / "runs",
        "dataset.root": folder / "shapes",
        "cluster.address": head.cluster,
        "cluster.resources": resources,
        **extra,
    }
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "jobs", step, "-c", "jobs/configs/demo.yaml", *arguments]
    return subprocess.run(
        command, cwd=PROJECT, env=head.environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def folder(head: RayHead, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a job has sharded, and another one has done the rest."""
    folder = tmp_path_factory.mktemp("resources")
    for step in ("shard", "run"):
        done = raydetr(head, folder, step, "{shard: {fast: 0.001}, train: {fast: 0.5}, evaluate: {plain: 0.001}}")
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_each_step_runs_where_its_resources_are(head: RayHead, folder: Path) -> None:
    nodes: dict[tuple[str, str], set[str]] = {}
    for job, name, node in json.loads(asked(head, WHERE, head.cluster, head.address)):
        nodes.setdefault((job, name.rpartition(".")[2]), set()).add(node)
    (trained,) = (job for job, name in nodes if name == "RayTrainWorker")
    (sharded,) = (job for job, name in nodes if name == "one" and job != trained)
    assert nodes[sharded, "one"] == {"node"}
    assert nodes[trained, "RayTrainWorker"] == {"node"}
    assert nodes.get((trained, "_evaluate"), {"head"}) | nodes.get((trained, "one"), {"head"}) == {"head"}


def test_room_is_where_all_resources_are(head: RayHead) -> None:
    assert asked(head, ROOM, head.cluster).split("\n") == ["2 True", "1 True", "0 False", ""]


@pytest.mark.parametrize(
    ("resources", "told"),
    [
        (
            "{train: {fst: 0.5}}",
            'cluster.resources.train {"fst": 0.5}: of 2 that each need CPU 0.5, fst 0.5 on one node, the Ray cluster '
            "has room for 0, and its nodes have the resources fast, plain: ",
        ),
        ("{train: {fast: 1}}", "of 2 that each need CPU 0.5, fast 1 on one node, the Ray cluster has room for 1, "),
        ("{shard: {fast: 0.1, plain: 0.1}}", 'cluster.resources.shard {"fast": 0.1, "plain": 0.1}: of 1 that each '),
        ("{evaluate: {plain: 2}}", 'cluster.resources.evaluate {"plain": 2.0}: of 1 that each need CPU 0.5, plain 2 '),
    ],
    ids=["a name", "too few", "not on one node", "too much"],
)
def test_what_no_node_has_is_one_line(head: RayHead, resources: str, told: str, tmp_path: Path) -> None:
    result = raydetr(head, tmp_path, "run", resources)
    assert result.returncode == 2
    assert told in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "runs" / "shards").exists()


def test_what_no_node_has_is_waited_for(head: RayHead, folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "runs" / "demo" / "evaluate")
    for step, where, cpus in (("shard", tmp_path, 1), ("evaluate", folder, 0.5)):
        result = raydetr(head, where, step, f"{{{step}: {{fst: 1}}}}", **{"cluster.wait": 1})
        assert result.returncode == 2
        assert (
            f"error: {step}: after 1 s (cluster.wait) the Ray cluster has room for 0 of 1 workers: add nodes with "
            f"CPU {cpus}, fst 1 for each"
        ) in result.stderr
