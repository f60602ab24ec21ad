"""jobs/nodes.py: what nodes say, and the network between them. tests/clusters/test_doctor.py has more than one."""

import os
import threading
import time
from collections.abc import Iterator

import pytest
import ray

from jobs.cluster import connected
from jobs.nodes import Probe, Silent, clock_offset, interface_of, links, on_each, probes
from pipeline.config.sections import ClusterSection


def raise_error() -> None:
    raise ValueError("no such thing\nand more")


def node_here() -> str:
    return str(ray.get_runtime_context().get_node_id())


@pytest.fixture(scope="module")
def busy_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with connected(ClusterSection(device="cpu")):
            cpus = ray.cluster_resources()["CPU"]
            holder = ray.remote(num_cpus=cpus)(Probe).remote()
            ray.get(holder.run.remote(time.time))
            yield


def test_a_busy_node_answers(busy_ray: None) -> None:
    with probes() as asked:
        ((node, probe),) = asked.items()
        assert on_each(asked, node_here) == {node: node.id}
        assert on_each(asked, raise_error) == {node: Silent("no such thing")}
        assert abs(clock_offset(probe)) < 0.5
        assert links(asked) == {}
        (dead,) = on_each(asked, os._exit, 1).values()
        assert isinstance(dead, Silent)


def test_a_node_that_takes_too_long(busy_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with probes() as asked:
        on_each(asked, node_here)
        monkeypatch.setattr("jobs.nodes.ANSWER_SECONDS", 0.1)
        assert set(on_each(asked, time.sleep, 60).values()) == {Silent("it has not answered for 0.1 s")}


def test_who_does_not_know_the_token_is_sent_away() -> None:
    receiver = Probe()
    port, token = receiver.listen("127.0.0.1")
    with pytest.raises(OSError, match=r"gone|reset|Broken"):
        Probe().send("127.0.0.1", port, bytes(len(token)))


def test_a_link_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.nodes.LINK_SECONDS", 0.05)
    before = threading.active_count()
    link = Probe().send("127.0.0.1", *Probe().listen("127.0.0.1"))
    assert 0 < link.latency < 1 < link.bandwidth
    while threading.active_count() > before:
        time.sleep(0.01)


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None
