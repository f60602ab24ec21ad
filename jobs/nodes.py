"""The nodes of the connected Ray: what each of them says, and how fast they hear each other."""

import fcntl
import hmac
import secrets
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import UserError
from pipeline.tracking import first_line

ANSWER_SECONDS = 60.0
"""Longest wait for all nodes to answer: a new process of Ray imports torch first."""
LINK_SECONDS = 1.0
"""For which one node sends to another."""
PINGS = 50
BLOCK = bytes(2**20)

_SIOCGIFADDR = 0x8915  # Linux, linux/sockios.h

Result = TypeVar("Result")


class Node(NamedTuple):
    """One node of the cluster: Ray's id, the host's name, and the address that other nodes reach it by."""

    id: str
    name: str
    address: str


class Silent(NamedTuple):
    """Why a node gave no answer."""

    why: str


class Link(NamedTuple):
    """From one node to another: half a round trip in seconds, and what one connection carries in bytes/s."""

    latency: float
    bandwidth: float


class Probe:
    """A process on one node, which takes none of its resources, so that a busy node answers as well."""

    def run(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """What a call gives there."""
        return call(*arguments)

    def listen(self, address: str) -> tuple[int, bytes]:
        """Wait for one sender that knows the token: the port and the token."""
        token = secrets.token_bytes(32)
        server = socket.create_server((address, 0))
        server.settimeout(ANSWER_SECONDS)
        threading.Thread(target=_receive, args=(server, token), daemon=True).start()
        return server.getsockname()[1], token

    def send(self, address: str, port: int, token: bytes) -> Link:
        """Measure the way to a node that listens."""
        with closing(socket.create_connection((address, port), timeout=10)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(token)
            latency = statistics.median(_ping(connection) for _ in range(PINGS)) / 2
            began = time.monotonic()
            while time.monotonic() - began < LINK_SECONDS:
                connection.sendall(BLOCK)
            connection.shutdown(socket.SHUT_WR)
            (received,) = struct.unpack(">Q", _exactly(connection, 8))
            return Link(latency, received / (time.monotonic() - began))


def _ping(connection: socket.socket) -> float:
    began = time.monotonic()
    connection.sendall(b"p")
    _exactly(connection, 1)
    return time.monotonic() - began


def _receive(server: socket.socket, token: bytes) -> None:
    """Echo the pings of one sender, count what comes after them, and tell it at its end."""
    with closing(server), suppress(OSError):
        connection, _ = server.accept()
        with closing(connection):
            connection.settimeout(10)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not hmac.compare_digest(_exactly(connection, len(token)), token):
                return
            for _ in range(PINGS):
                connection.sendall(_exactly(connection, 1))
            received, buffer = 0, bytearray(len(BLOCK))
            while count := connection.recv_into(buffer):
                received += count
            connection.sendall(struct.pack(">Q", received))


def _exactly(connection: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count:
        part = connection.recv(count - len(got))
        if not part:
            raise OSError("the other side has gone")
        got += part
    return got


@contextmanager
def probes() -> Iterator[dict[Node, Any]]:
    """A probe on each living node, gone at the end of the block."""
    made = {}
    for node in sorted(ray.nodes(), key=lambda node: str(node["NodeName"])):
        if node["Alive"]:
            there = Node(node["NodeID"], node["NodeManagerHostname"], node["NodeManagerAddress"])
            at = NodeAffinitySchedulingStrategy(there.id, soft=False)
            made[there] = ray.remote(num_cpus=0)(Probe).options(scheduling_strategy=at).remote()
    try:
        yield made
    finally:
        for probe in made.values():
            with suppress(RayError):
                ray.kill(probe)


def on_each(asked: Mapping[Node, Any], call: Callable[..., Result], *arguments: Any) -> dict[Node, Result | Silent]:
    """What a call gives on each node."""
    answers = {node: probe.run.remote(call, *arguments) for node, probe in asked.items()}
    ray.wait(list(answers.values()), num_returns=len(answers), timeout=ANSWER_SECONDS)
    return {node: _answer(reference) for node, reference in answers.items()}


def _answer(reference: Any, seconds: float = 0.1) -> Any:
    try:
        return ray.get(reference, timeout=seconds)
    except GetTimeoutError:
        return Silent(f"it has not answered for {ANSWER_SECONDS:g} s")
    except RayTaskError as error:
        return Silent(first_line(error.cause))
    except RayError as error:
        return Silent(first_line(error))


def clock_offset(probe: Any) -> float:
    """Seconds by which a node's clock is ahead of this process's, by the quickest of some answers."""
    answers: list[tuple[float, float]] = []
    for _ in range(5):
        asked = time.time()
        there = _answer(probe.run.remote(time.time), ANSWER_SECONDS)
        back = time.time()
        if isinstance(there, Silent):
            raise UserError(f"a node of the cluster was lost ({there.why}); give the command again")
        answers.append((back - asked, there - (asked + back) / 2))
    return min(answers)[1]


def links(asked: Mapping[Node, Any]) -> dict[tuple[Node, Node], Link | Silent]:
    """From each node to the next, in a ring as gradients go, one after the other."""
    nodes = list(asked)
    pairs = list(zip(nodes, nodes[1:] + nodes[:1], strict=True))[: 1 if len(nodes) == 2 else None]
    return {(one, other): _measured(asked[one], asked[other], other.address) for one, other in pairs if one != other}


def _measured(sender: Any, receiver: Any, address: str) -> Link | Silent:
    listening = _answer(receiver.listen.remote(address), ANSWER_SECONDS)
    if isinstance(listening, Silent):
        return listening
    return _answer(sender.send.remote(address, *listening), ANSWER_SECONDS)  # type: ignore[no-any-return]


def interface_of(address: str) -> str | None:
    """Name of this host's network interface that has an IPv4 address, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # it has no IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
