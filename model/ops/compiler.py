"""The C++ compiler that the operator is built with. `setup.py` runs this file alone, where there is no torch yet."""

import os
import shutil


def compiler() -> str | None:
    """The path of the compiler that CXX names, else of one of the usual ones; None if it is not there."""
    names = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)
