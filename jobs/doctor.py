"""`raydetr doctor`: what this machine has and lacks for the pipeline, and whether its compiled operator is right."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from jobs.cluster import connected
from model.ops.compiler import compiler
from model.ops.operator import compiled, cuda_architectures, description
from model.ops.proof import prove, runs_on
from pipeline.config.sections import ClusterSection
from pipeline.data.loader import SHARED_MEMORY
from pipeline.errors import UserError

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
FREE_GIB = 5
SHARED_GIB = 1


class Finding(NamedTuple):
    """One line of the report."""

    state: Literal["ok", "note", "missing", "wrong"]
    what: str
    detail: str

    @property
    def failed(self) -> bool:
        """Whether the pipeline cannot run, or not rightly, before it is mended."""
        return self.state in ("missing", "wrong")


def examine(address: str | None = None) -> list[Finding]:
    """Look at the packages, the devices, the operator, the disk, the shared memory, and Ray if an address is given."""
    findings = [Finding("ok", "python", f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} CPUs")]
    findings += [_package(name) for name in PACKAGES]
    findings += [_gpu(), *_operator(), _disk(), *_shared_memory()]
    if address is not None:
        findings.append(_cluster(address))
    return findings


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


def _cluster(address: str) -> Finding:
    import ray

    try:
        with connected(ClusterSection(address=address)):
            have = ray.cluster_resources()
            nodes = sum(node["Alive"] for node in ray.nodes())
    except UserError as error:
        return Finding("missing", "ray cluster", str(error))
    return Finding("ok", "ray cluster", f"{nodes} nodes, {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs")
