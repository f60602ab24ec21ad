"""`raydetr doctor`: what this machine, or each node of a cluster, has and lacks, and whether its operator is right."""

import importlib.metadata
import os
import platform
import shutil
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import ray
import torch

from jobs.cluster import connected
from jobs.nodes import Link, Node, Silent, clock_offset, interface_of, links, on_each, probes
from model.ops.compiler import compiler
from model.ops.operator import compiled, cuda_architectures, description
from model.ops.proof import prove, runs_on
from pipeline.config.address import SQLITE, shown, sqlite_path
from pipeline.config.sections import ClusterSection, Config
from pipeline.data.loader import SHARED_MEMORY
from pipeline.errors import UserError
from pipeline.store import Place, StorePath, absolute
from pipeline.tracking import connect, server_errors, why

PACKAGES = (
    "torch",
    "ray",
    "deepspeed",
    "webdataset",
    "hotcoco",
    "pycocotools",
    "mlflow",
    "opencv-python-headless",
    "pillow",
)
SAME = (*PACKAGES, "python")
"""What all nodes must have alike: workers of one run give the same numbers, and read what the others wrote."""
FREE_GIB = 5
SHARED_GIB = 1
CLOCK_SECONDS = 1.0
"""Clocks further apart than this are told: the times in logs and of uploads would not fit together."""
SLOW_LINK = 0.5
"""A link that carries less than this share of what is usual in the cluster is told: the slowest holds up all."""


class Finding(NamedTuple):
    """One line of the report."""

    state: Literal["ok", "note", "missing", "wrong"]
    what: str
    detail: str
    nodes: str = ""
    """Those of a cluster that it is about; empty for this machine."""

    def __str__(self) -> str:
        return f"{self.state:<8} {self.what:<22} {self.nodes + ': ' if self.nodes else ''}{self.detail}"

    @property
    def failed(self) -> bool:
        """Whether the pipeline cannot run, or not rightly, before it is mended."""
        return self.state in ("missing", "wrong")


def examine() -> list[Finding]:
    """Look at this machine's packages, devices, operator, disk and shared memory."""
    return [
        Finding("ok", "python", platform.python_version()),
        Finding("ok", "machine", f"{platform.machine()}, {os.cpu_count()} CPUs"),
        *(_package(name) for name in PACKAGES),
        _gpu(),
        *_operator(),
        _disk(),
        *_shared_memory(),
    ]


def _package(name: str) -> Finding:
    try:
        return Finding("ok", name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding("missing", name, "not installed: run `make setup`")


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        return Finding("note", "gpu", f"none is usable here (torch is {build}); training runs on the CPU")
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return Finding("ok", "gpu", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")


def _operator() -> list[Finding]:
    """Which kernels there are, how to get those that are not, and whether those that are compute what they should."""
    findings = [Finding("ok" if compiled() else "note", "attention operator", description() + _how_to_build())]
    if compiled():
        findings.append(_prove("cpu"))
    for index in range(torch.cuda.device_count() if compiled("cuda") else 0):
        findings.append(_prove_on_card(index))
    return findings


def _how_to_build() -> str:
    if not compiled():
        get = "" if compiler() else "install a C++ compiler (g++, or another that CXX names) and "
        return f"; {get}build them with `make -B setup`, or set cluster.require_compiled=false to train without"
    if not compiled("cuda") and torch.version.cuda:
        return f"; with nvcc {torch.version.cuda} here, build them with `RAYDETR_CUDA=1 make -B setup`"
    return ""


def _prove_on_card(index: int) -> Finding:
    """The proof for one GPU, unless the kernels were built for others."""
    capability, built = torch.cuda.get_device_capability(index), cuda_architectures()
    if not runs_on(built, capability):
        number = "{}.{}".format(*capability)
        mend = f"build them with `TORCH_CUDA_ARCH_LIST={number} RAYDETR_CUDA=1 make -B setup`"
        return Finding("wrong", f"operator on cuda:{index}", f"a card of {number} and kernels for {built}: {mend}")
    return _prove(f"cuda:{index}")


def _prove(device: str) -> Finding:
    proof = prove(device)
    return Finding("ok" if proof.holds else "wrong", f"operator on {device}", proof.told)


def _disk() -> Finding:
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free / 2**30
    return Finding("ok" if free >= FREE_GIB else "note", "disk", f"{free:.0f} GiB free in {folder}")


def _shared_memory() -> list[Finding]:
    """Of Linux: a container has 64 MiB of it where nobody asks for more."""
    if not os.path.isdir(SHARED_MEMORY):
        return []
    free = shutil.disk_usage(SHARED_MEMORY).free / 2**30
    mend = "" if free >= SHARED_GIB else "; give a container more (`--shm-size`), or set train.loader_workers: 0"
    return [Finding("note" if mend else "ok", "shared memory", f"{free:.1f} GiB free in {SHARED_MEMORY}{mend}")]


def examine_config(config: Config) -> list[Finding]:
    """Look from this machine for the places that a pipeline names, and for its tracking server."""
    return [*(_place(*named) for named in _places(config)), _server(config.tracking_uri)]


def _places(config: Config) -> list[tuple[str, Place]]:
    return [
        ("dataset.root", config.dataset.place),
        ("shards.out", config.shards_folder),
        ("runs", absolute(config.runs)),
    ]


def _place(key: str, there: Place, must_be: bool = False) -> Finding:
    if isinstance(there, StorePath):
        try:
            (there / "raydetr-doctor").exists()  # whether or not: the store has answered
        except UserError as error:
            return Finding("missing", key, str(error))
        return Finding("ok", key, f"{there}: its store answers")
    if there.exists():
        return Finding("ok", key, f"{there}: is there")
    if must_be:
        mend = "put it on a disk that all hosts share, or into a store (`s3://...`)"
        return Finding("missing", key, f"{there}: this machine has it and the node has not; {mend}")
    return Finding("note", key, f"{there}: is not there yet")


def _server(uri: str) -> Finding:
    what, address = "tracking.uri", shown(uri)
    if uri.startswith(SQLITE) and not sqlite_path(uri).exists():
        return Finding("note", what, f"{address}: is made by the first run")
    try:
        connect(uri).search_experiments(max_results=1)
    except UserError as error:
        return Finding("missing", what, str(error))
    except server_errors() as error:
        mend = "training goes on without it, and what it is to get waits"
        return Finding("missing", what, f"{address}: {why(error)}; {mend}")
    return Finding("ok", what, f"{address}: answers")


def examine_cluster(address: str, config: Config | None = None) -> list[Finding]:
    """Look at every node of a Ray cluster, from a process on each, and at the network between them.

    Args:
        address: of the cluster, as `cluster.address`.
        config: a pipeline that is to run there; its places are looked for from each node.
    """
    try:
        with connected(ClusterSection(address=address)), probes() as asked:
            answers = on_each(asked, _examine_node)
            lines = merged({_label(node, asked): answer for node, answer in answers.items()})
            for key, there in _places(config) if config else []:
                is_here = isinstance(there, Path) and there.exists()
                seen = on_each(asked, _place, key, there, is_here)
                lines += merged({_label(node, asked): _listed(answer) for node, answer in seen.items()})
            whole = {node: asked[node] for node, answer in answers.items() if not isinstance(answer, Silent)}
            cpus, gpus = _total("CPU"), _total("GPU")
            return [
                Finding("ok", "ray cluster", f"{len(asked)} nodes, {cpus:g} CPUs, {gpus:g} GPUs"),
                *lines,
                *(_clock(_label(node, asked), clock_offset(probe)) for node, probe in whole.items()),
                *told_links({(_label(a, asked), _label(b, asked)): link for (a, b), link in links(whole).items()}),
            ]
    except UserError as error:
        return [Finding("missing", "ray cluster", str(error))]


def _total(resource: str) -> float:
    return float(ray.cluster_resources().get(resource, 0))


def _label(node: Node, nodes: Iterable[Node]) -> str:
    """A node's name, with its address where another has the same name."""
    alike = sum(node.name == other.name for other in nodes) > 1
    return f"{node.name} ({node.id[:6]}, {node.address})" if alike else node.name


def _listed(answer: Finding | Silent) -> list[Finding] | Silent:
    return answer if isinstance(answer, Silent) else [answer]


def _examine_node() -> list[Finding]:
    address = ray.util.get_node_ip_address()
    network = Finding("ok", "network", f"{address} on {interface_of(address) or 'no interface of its own'}")
    return [*examine(), network]


def merged(answers: Mapping[str, list[Finding] | Silent]) -> list[Finding]:
    """One line for what all nodes say alike, else one for those that agree; what must not differ is then wrong.

    Args:
        answers: findings, or why there are none, by the name of the node.
    """
    said: dict[str, dict[Finding, list[str]]] = {}
    for node, findings in answers.items():
        if isinstance(findings, Silent):
            findings = [Finding("wrong", "node", f"{findings.why}; start its Ray again, from the same lock")]
        for finding in findings:
            said.setdefault(finding.what, {}).setdefault(finding, []).append(node)
    return [line for what, by_finding in said.items() for line in _lines(what, by_finding, len(answers))]


def _lines(what: str, said: Mapping[Finding, list[str]], count: int) -> list[Finding]:
    most = max(said, key=lambda finding: len(said[finding]))
    lines = []
    for finding, nodes in said.items():
        line = finding._replace(nodes=f"all {count} nodes" if len(nodes) == count > 1 else ", ".join(nodes))
        if finding != most and what in SAME and not finding.failed:
            mend = "install the same lock with `make -B setup`"
            line = line._replace(state="wrong", detail=f"{finding.detail}, not {most.detail} as elsewhere: {mend}")
        lines.append(line)
    return lines


def _clock(node: str, offset: float) -> Finding:
    mend = "" if abs(offset) <= CLOCK_SECONDS else ": let a time server set it (chrony, systemd-timesyncd)"
    return Finding("note" if mend else "ok", "clock", f"{offset:+.3f} s against this machine{mend}", node)


def told_links(measured: Mapping[tuple[str, str], Link | Silent]) -> list[Finding]:
    """A line for each link: cut is wrong, and much slower than the others is told."""
    usual = statistics.median([link.bandwidth for link in measured.values() if isinstance(link, Link)] or [0.0])
    findings = []
    for (one, other), link in measured.items():
        nodes = f"{one} -> {other}"
        if isinstance(link, Silent):
            mend = "open the ports between nodes to each other"
            findings.append(Finding("wrong", "link", f"{link.why}; {mend}", nodes))
            continue
        mend = "" if link.bandwidth >= SLOW_LINK * usual else ": slower than the others, and every step waits for it"
        text = f"{link.latency * 1e3:.2f} ms, {link.bandwidth / 1e9:.2f} GB/s over one connection{mend}"
        findings.append(Finding("note" if mend else "ok", "link", text, nodes))
    return findings
