"""Entry of a registered detector, which MLflow runs as a script: pictures in, the detections of each out.

A version carries a copy of this file with the code that answers beside it (see `package`). That code is imported under
the cover of a private path, so that it works where the user has a `model.py` of their own.
"""

import importlib
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas  # type: ignore[import-untyped]
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PyFuncModel, PythonModel, PythonModelContext

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


def given_to(model: type[PyFuncModel]) -> dict[str, Any]:
    """The arguments of the call of MLflow's own `predict` that led here; empty where there is none.

    MLflow passes on what the signature names, and warns of the rest in its log alone.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "predict" and isinstance(frame.f_locals.get("self"), model):
            return frame.f_locals
        frame = frame.f_back
    return {}


def unknown(given: dict[str, Any]) -> list[str]:
    """The columns and parameters that a caller has given and this model does not have."""
    columns = [*given["data"]] if isinstance(given.get("data"), pandas.DataFrame | dict) else []
    return [str(name) for name in columns if name != "image"] + [
        str(name) for name in given.get("params") or {} if name != "score_threshold"
    ]


class RegisteredDetector(PythonModel):  # type: ignore[misc]
    """The pyfunc model."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the detector that the version carries."""
        self.code: Any = import_own("pipeline.predict.answers")
        self.detector = self.code.Detector.load(Path(context.artifacts["detector"]))

    def predict(
        self, context: PythonModelContext, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Answer each picture of the column `image`, as `pipeline.predict.answers` says.

        Raises:
            MlflowException: what was asked is wrong, which a server answers with 400.
        """
        if wrong := unknown(given_to(PyFuncModel)):
            raise MlflowException.invalid_parameter_value(
                f"unknown: {', '.join(wrong)}; there are the column image and the parameter score_threshold"
            )
        pictures = [picture for cell in model_input["image"] for picture in self.code.pictures_in(cell)]
        try:
            if os.environ.get("_MLFLOW_IS_IN_SERVING_ENVIRONMENT") == "true":
                self.code.check_request(pictures)
            answers: list[dict[str, Any]] = self.code.answer(self.detector, pictures, **(params or {}))
        except self.code.UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return answers


set_model(RegisteredDetector())
