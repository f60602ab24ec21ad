"""The network, in pure torch: it knows no ranks, writes no logs and reads no files but weights.

Use: `build_model(DetrConfig(num_classes=80)).to("cuda")(PixelBatch.collate(images).to("cuda"))`.

Settings are read without torch, which takes seconds to import: `import model` brings the settings alone, and any other
name comes with its file when it is first asked for (PEP 562). This project's own code imports the files.
"""

import importlib
from typing import TYPE_CHECKING, Any

from model.config import CriterionConfig, DetrConfig

if TYPE_CHECKING:
    from model.batch import ImageBatch, PixelBatch
    from model.build import build_model
    from model.detections import postprocess
    from model.losses.criterion import Criterion
    from model.recompute import recompute_activations

_FILES = {
    "Criterion": "model.losses.criterion",
    "ImageBatch": "model.batch",
    "PixelBatch": "model.batch",
    "build_model": "model.build",
    "postprocess": "model.detections",
    "recompute_activations": "model.recompute",
}

__all__ = [
    "Criterion",
    "CriterionConfig",
    "DetrConfig",
    "ImageBatch",
    "PixelBatch",
    "build_model",
    "postprocess",
    "recompute_activations",
]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FILES[name]), name)


def __dir__() -> list[str]:
    return __all__
