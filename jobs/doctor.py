"""`raydetr doctor`: what this machine has and lacks for the pipeline, and whether its compiled operator is right."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from jobs.cluster import connected
from model import ops
from model.ops import reference
from pipeline.config.sections import ClusterSection
from pipeline.errors import UserError

PACKAGES = ("torch", "ray", "deepspeed", "webdataset", "pycocotools", "mlflow", "opencv-python-headless", "pillow")
FREE_GIB = 5
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Largest error of the compiled operator that is right, over the largest value of the exact result."""


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
    """Look at the packages, the devices, the operator, the disk and, when an address is given, at Ray there."""
    findings = [Finding("ok", "python", f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} CPUs")]
    findings += [_package(name) for name in PACKAGES]
    findings += [_gpu(), *_operator(), _disk()]
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
    findings = [Finding("ok" if ops.compiled() else "note", "attention operator", ops.description() + _how_to_build())]
    if ops.compiled():
        findings.append(prove("cpu"))
    for index in range(torch.cuda.device_count() if ops.compiled("cuda") else 0):
        findings.append(_prove_on_card(index))
    return findings


def _how_to_build() -> str:
    if not ops.compiled():
        names = (os.environ.get("CXX", "").split()[:1]) or ["c++", "g++", "clang++"]
        found = any(map(shutil.which, names))
        get = "" if found else "install a C++ compiler (g++, or another that CXX names) and "
        return f"; {get}build them with `make -B setup`, or set cluster.require_compiled=false to train without"
    if not ops.compiled("cuda") and torch.version.cuda:
        return f"; with nvcc {torch.version.cuda} here, build them with `RAYDETR_CUDA=1 make -B setup`"
    return ""


def _prove_on_card(index: int) -> Finding:
    """The proof for one GPU, unless the kernels were built for others."""
    assert ops.kernels is not None
    capability = torch.cuda.get_device_capability(index)
    built = ops.kernels.CUDA_ARCHITECTURES
    if not runs_on(built, capability):
        number = "{}.{}".format(*capability)
        mend = f"build them with `TORCH_CUDA_ARCH_LIST={number} RAYDETR_CUDA=1 make -B setup`"
        return Finding("wrong", f"operator on cuda:{index}", f"a card of {number} and kernels for {built}: {mend}")
    return prove(f"cuda:{index}")


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a card runs kernels that were built for the architectures of a TORCH_CUDA_ARCH_LIST.

    A binary serves its own generation from its minor version on (with a suffix, as in 9.0a, that card alone), and PTX
    whatever is later. Of names, as in Hopper, that is left to the proof.
    """
    for architecture in architectures.replace(";", " ").split():
        number, _, ptx = architecture.partition("+")
        if not number[:1].isdigit():
            return True
        major, minor = map(int, number.rstrip("af").split("."))
        if capability == (major, minor):
            return True
        if not number[-1].isdigit():
            continue
        if (capability[0] == major and capability[1] > minor) or (ptx and capability > (major, minor)):
            return True
    return False


def prove(device: str) -> Finding:
    """Run the operator and its gradients on a small case, and compare them with plain torch in fp64."""
    what = f"operator on {device}"
    try:
        errors = {dtype: operator_error(device, dtype) for dtype in TOLERANCE}
    except RuntimeError as error:
        return Finding("wrong", what, f"it fails: {f'{error}'.splitlines()[0]}")
    told = ", ".join(f"{error:.1e} in {dtype}".replace("torch.", "") for dtype, error in errors.items())
    if all(errors[dtype] <= most for dtype, most in TOLERANCE.items()):
        return Finding("ok", what, f"output and gradients agree with plain torch (largest relative error {told})")
    return Finding("wrong", what, f"it differs from plain torch (largest relative error {told}); do not train with it")


class _Case(NamedTuple):
    """Inputs of the operator in fp64, and the gradient of its output."""

    value: Tensor
    locations: Tensor
    weights: Tensor
    grad: Tensor


_SHAPES = [(6, 9), (3, 5), (1, 1)]


def _make_case() -> _Case:
    generator = torch.Generator().manual_seed(0)
    like: Any = {"generator": generator, "dtype": torch.float64}
    size = (2, 40, 2, len(_SHAPES), 4)
    sizes = torch.tensor([(w, h) for h, w in _SHAPES])[:, None]
    # Some points lie outside; none where the lower neighbour changes, which would change the gradient by rounding.
    cells = ((torch.rand(*size, 2, **like) * 1.4 - 0.2) * sizes).floor()
    fractions = torch.rand(*size, 2, **like) * 0.9 + 0.05
    return _Case(
        value=torch.randn(2, sum(h * w for h, w in _SHAPES), 2, 32, **like),
        locations=(cells + fractions - 0.5) / sizes,
        weights=torch.rand(size, **like),
        grad=torch.randn(2, 40, 64, **like),
    )


def _results(operator: Callable[..., Tensor], case: _Case, device: str) -> list[Tensor]:
    """Output and the three gradients, in fp64 on the host."""
    leaves = [tensor.to(device, copy=True).requires_grad_() for tensor in case[:3]]
    output = operator(leaves[0], _SHAPES, *leaves[1:])
    gradients = torch.autograd.grad(output, leaves, case.grad.to(device))
    return [tensor.detach().cpu().double() for tensor in (output, *gradients)]


def operator_error(device: str, dtype: torch.dtype) -> float:
    """Largest error of the operator's output and its three gradients, each over the largest value of plain torch's.

    NaN where the operator's result has one.
    """
    exact = _make_case()
    sampling = torch.promote_types(dtype, torch.float32)
    rounded = _Case(
        exact.value.to(dtype), exact.locations.to(sampling), exact.weights.to(sampling), exact.grad.to(dtype)
    )
    ours = _results(ops.ms_deform_attn, rounded, device)
    wanted = _results(reference.ms_deform_attn, _Case(*(tensor.double() for tensor in rounded)), "cpu")
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(ours, wanted, strict=True)]
    return float(torch.stack(errors).max())


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
