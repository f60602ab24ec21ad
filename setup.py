"""Builds `_raydetr`, the compiled attention operator, where there is a C++ compiler; see `csrc/`.

Without one (or without torch to build against) the project installs all the same and runs the operator in plain torch.
`CXX` names another compiler, `MAX_JOBS` bounds how many run at a time.
"""

import os
import shutil
import warnings

from setuptools import setup

# No fast-math: NaN and infinity keep their meaning. Comparisons and rounding may be done speculatively, in vectors.
CPU_FLAGS = ["-O3", "-std=c++17", "-Wall", "-Wno-psabi", "-fno-math-errno", "-fno-trapping-math"]
# LibTorch's stable ABI of 2.10: one build serves every later torch.
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000")]


def compiler() -> str | None:
    """The C++ compiler that the build would call, if it is there."""
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def build_options() -> dict[str, object]:
    """The extension module, or nothing, with one warning, where it cannot be built."""
    found = compiler()
    if found is None:
        warnings.warn("no C++ compiler: the attention operator is not compiled, plain torch is used", stacklevel=2)
        return {}
    try:
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
    extension = cpp_extension.CppExtension(
        "_raydetr",
        sources,
        define_macros=MACROS,
        extra_compile_args={"cxx": CPU_FLAGS},
        extra_link_args=["-s"],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(no_python_abi_suffix=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**build_options())
