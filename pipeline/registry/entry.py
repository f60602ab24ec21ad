"""Entry of a registered detector, which MLflow runs as a script: encoded pictures in, JSON lists of detections out.

A version carries a copy of this file with the code that answers beside it (see `package`). That code is imported under
the cover of a private path, so that it works where the user has a `model.py` of their own.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas  # type: ignore[import-untyped]
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

CODE = Path(__file__).resolve().parent / "code" / "raydetr"
"""Holds the packages that this version was registered with."""


def import_own(name: str) -> ModuleType:
    """Import a module of this version's own code, whatever other `model` and `pipeline` there are.

    Those are left as they were. So nothing may be imported later, when it is the others that are found.
    """

    def packages() -> list[str]:
        return [module for module in sys.modules if module.split(".")[0] in ("model", "pipeline")]

    aside = {module: sys.modules.pop(module) for module in packages()}
    sys.path.insert(0, str(CODE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(CODE))
        for module in packages():
            del sys.modules[module]
        sys.modules.update(aside)


class RegisteredDetector(PythonModel):  # type: ignore[misc]
    """The pyfunc model."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the detector that the version carries."""
        self.code: Any = import_own("pipeline.predict.detector")
        self.detector = self.code.Detector.load(Path(context.artifacts["detector"]))

    def predict(
        self, context: PythonModelContext, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """Answer: one JSON list of detections a row of the column `image`, an encoded picture."""
        threshold = (params or {}).get("score_threshold", 0.0)
        answers: list[str] = self.code.answer(self.detector, list(model_input["image"]), threshold)
        return answers


set_model(RegisteredDetector())
