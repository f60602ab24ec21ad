"""`raydetr doctor`: what this machine has for the pipeline, and what it lacks."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from jobs.cluster import connected
from model import ops
from pipeline.config import ClusterSection
from pipeline.errors import UserError

PACKAGES = ("torch", "ray", "deepspeed", "webdataset", "pycocotools", "mlflow", "opencv-python-headless", "pillow")
FREE_GIB = 5


class Finding(NamedTuple):
    """One line of the report."""

    state: Literal["ok", "note", "missing"]
    what: str
    detail: str


def examine(address: str | None = None) -> list[Finding]:
    """Look at the packages, the devices, the operator, the disk and, when an address is given, at Ray there."""
    findings = [Finding("ok", "python", f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} CPUs")]
    findings += [_package(name) for name in PACKAGES]
    findings += [_gpu(), _operator(), _disk()]
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


def _operator() -> Finding:
    mend = "" if ops.compiled() else "; set cluster.require_compiled=false to train with it"
    return Finding("ok" if ops.compiled() else "note", "attention operator", ops.description() + mend)


def _disk() -> Finding:
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free / 2**30
    return Finding("ok" if free >= FREE_GIB else "note", "disk", f"{free:.0f} GiB free in {folder}")


def _cluster(address: str) -> Finding:
    import ray

    try:
        with connected(ClusterSection(address=address)):
            have = ray.cluster_resources()
            nodes = sum(node["Alive"] for node in ray.nodes())
    except UserError as error:
        return Finding("missing", "ray cluster", str(error))
    return Finding("ok", "ray cluster", f"{nodes} nodes, {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs")
