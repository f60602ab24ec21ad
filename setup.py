"""Builds `_raydetr`, the compiled attention operator, as far as this machine allows; see `csrc/`.

Without a C++ compiler (or without torch to build against) the project installs all the same and runs the operator in
plain torch. The environment decides on CUDA, never a GPU, so that an image can be built where there is none:

    RAYDETR_CUDA          0: without the CUDA kernels; 1: with them, or it is an error; unset: with them when torch is a
                          CUDA build and an nvcc that fits it is there
    TORCH_CUDA_ARCH_LIST  architectures, as torch's extensions take them
    CUDA_HOME, CXX        the CUDA toolkit and the C++ compiler, if not those in the path
    MAX_JOBS              how many compilers run at a time
"""

import os
import re
import shutil
import subprocess
import warnings
from pathlib import Path
from runpy import run_path

from setuptools import setup

# No fast-math: NaN and infinity keep their meaning. Comparisons and rounding may be done speculatively, in vectors.
CPU_FLAGS = ["-O3", "-std=c++17", "-Wall", "-Wno-psabi", "-fno-math-errno", "-fno-trapping-math"]
CUDA_FLAGS = ["-O3", "-std=c++17", "--threads", "2"]
# LibTorch's stable ABI of 2.10: one build serves every later torch. USE_CUDA declares its functions for streams.
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
# By its path: the packages are not installed yet, and `model.ops` imports torch.
compiler = run_path(str(Path(__file__).with_name("model") / "ops" / "compiler.py"))["compiler"]


def nvcc_release() -> str | None:
    """The release of the CUDA compiler, such as 13.0, if it is there."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+\.\d+)", text)
    return release[1] if release else None


def with_cuda(wanted: str, torch_cuda: str | None, nvcc: str | None) -> bool:
    """Whether to build the CUDA kernels.

    Args:
        wanted: what RAYDETR_CUDA says.
        torch_cuda: the CUDA release that torch was built for; None for a CPU build.
        nvcc: the release of the compiler, if there is one.

    Raises:
        SystemExit: they are wanted and cannot be built, or `wanted` is not a choice.
    """
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"RAYDETR_CUDA is {wanted!r}: set it to 0 or 1, or leave it unset")
    if wanted == "0" or (wanted == "" and torch_cuda is None):
        return False
    if torch_cuda is None:
        problem = "torch is a CPU build; install the torch of a CUDA release"
    elif nvcc is None:
        problem = f"there is no nvcc; install the CUDA toolkit {torch_cuda} or set CUDA_HOME"
    elif nvcc.split(".")[0] != torch_cuda.split(".")[0]:
        problem = f"nvcc is of CUDA {nvcc} and torch is built for {torch_cuda}; their major versions have to be equal"
    else:
        return True
    if wanted == "1":
        raise SystemExit(f"RAYDETR_CUDA=1, but {problem}")
    warnings.warn(f"the attention operator is compiled for the CPU only: {problem}", stacklevel=2)
    return False


def architectures(nvcc: str) -> str:
    """What to compile for when TORCH_CUDA_ARCH_LIST does not say: as much as a compiler of this release knows."""
    newest = "9.0;10.0;12.0+PTX" if tuple(map(int, nvcc.split("."))) >= (12, 8) else "9.0+PTX"
    return "8.0;8.6;8.9;" + newest


def build_options() -> dict[str, object]:
    """The extension module, or nothing, with one warning, where it cannot be built."""
    found = compiler()
    if found is None:
        warnings.warn("no C++ compiler: the attention operator is not compiled, plain torch is used", stacklevel=2)
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        warnings.warn(
            "no torch in the build environment (use --no-build-isolation): the attention operator is not compiled, "
            "plain torch is used",
            stacklevel=2,
        )
        return {}
    os.environ["CXX"] = os.environ.get("CXX", found)
    sources = ["csrc/ms_deform_attn.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/ms_deform_attn.cpp"]
    macros, flags, extension_type = list(MACROS), {"cxx": CPU_FLAGS}, cpp_extension.CppExtension
    nvcc = nvcc_release()
    if with_cuda(os.environ.get("RAYDETR_CUDA", ""), torch.version.cuda, nvcc):
        chosen = os.environ.get("TORCH_CUDA_ARCH_LIST") or architectures(str(nvcc))
        os.environ["TORCH_CUDA_ARCH_LIST"] = chosen
        sources += ["csrc/cuda/ms_deform_attn.cu"]
        macros += [("USE_CUDA", None), ("RAYDETR_CUDA_ARCHITECTURES", f'"{chosen}"')]
        flags["nvcc"] = CUDA_FLAGS
        extension_type = cpp_extension.CUDAExtension
    extension = extension_type(
        "_raydetr",
        sources,
        define_macros=macros,
        extra_compile_args=flags,
        extra_link_args=["-s"],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(no_python_abi_suffix=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    setup(**build_options())
