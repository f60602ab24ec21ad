"""Room for workers on a real Ray: what is free, what is waited for, and what answers nobody."""

import socket
import time
from collections.abc import Iterator

import pytest
import ray

import jobs.room
from jobs.cluster import connected
from jobs.room import Growth, room, wait_for_room
from pipeline.config.sections import ClusterSection, Config
from pipeline.errors import UserError

WORKER = {"CPU": 1.0}


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with connected(ClusterSection(device="cpu")):
            yield int(ray.cluster_resources()["CPU"])


def wait_until_free(cpus: float) -> None:
    while ray.available_resources().get("CPU", 0) != cpus:
        time.sleep(0.1)


@pytest.fixture
def busy(ray_here: int) -> Iterator[int]:
    """CPUs of a Ray of which something else has one."""

    @ray.remote(num_cpus=1)
    class Other:
        pass

    other = Other.remote()
    wait_until_free(ray_here - 1)
    yield ray_here
    ray.kill(other)
    wait_until_free(ray_here)


def test_what_is_free_and_what_is_held_is_room(busy: int) -> None:
    assert room(WORKER) == busy - 1
    assert room({"CPU": 0.5}) == 2 * (busy - 1)
    assert room(WORKER, held=1) == busy
    assert room(WORKER, held=9) == busy
    assert room({"CPU": 1.0, "GPU": 1.0}) == 0


def test_a_node_that_does_not_answer_has_no_room(ray_here: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        gone = {**ray.nodes()[0], "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": closed.getsockname()[1]}
        monkeypatch.setattr(ray, "nodes", lambda: [gone])
        assert room(WORKER) == 0


def test_the_most_that_fit_begin(busy: int) -> None:
    cluster = ClusterSection(workers=(1, 2 * busy), cpus_per_worker=1)
    sizes = [2 * busy, busy - 1, 1]
    assert wait_for_room(cluster, sizes, WORKER) == busy - 1
    assert wait_for_room(cluster, [busy - 1, 1], WORKER) == busy - 1


def test_the_wait_is_limited(ray_here: int) -> None:
    cluster, looks = ClusterSection(workers=ray_here + 1, wait=1), list[None]()
    room_for = f"room for {ray_here} of {ray_here + 1} workers: add nodes with CPU 1 for each"
    told = rf"^train: after 1 s \(cluster\.wait\) .* {room_for}"
    with pytest.raises(UserError, match=told):
        wait_for_room(cluster, [ray_here + 1], WORKER, on_look=lambda: looks.append(None))
    assert looks


def test_room_that_lasts_is_for_growth(busy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.room, "GROW_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(jobs.room, "GROW_SECONDS", 0.3)
    sections = {
        "name": "a",
        "train": {"global_batch": 2 * busy, "micro_batch": 1},
        "cluster": {"workers": [1, busy], "device": "cpu"},
    }
    growth = Growth(Config.model_validate(sections), busy - 1)
    began, asked = time.monotonic(), 0
    assert not growth.has_room
    while not growth.is_due():
        asked += 1
        assert time.monotonic() - began < 30
    assert time.monotonic() - began >= 0.3
    assert asked > 1
    assert growth.has_room
    largest = Growth(Config.model_validate(sections), busy)
    time.sleep(0.4)
    assert not largest.is_due()
