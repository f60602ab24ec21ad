"""Detectors by their settings, and the face of the package."""

import subprocess
import sys

import pytest

import model
from model.build import build_model
from model.config import DetrConfig
from model.deformable_detr import DeformableDetr
from model.detections import postprocess
from model.detr import Detr
from tests.builders import make_detector


@pytest.mark.parametrize(("arch", "kind"), [("deformable_detr", DeformableDetr), ("detr", Detr)])
def test_the_architecture_decides(arch: str, kind: type) -> None:
    assert type(make_detector(arch=arch)) is kind


class TestFace:
    def test_settings_are_read_without_torch(self) -> None:
        program = "import sys, model, model.config; model.DetrConfig(); assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60)

    def test_every_public_name_comes_with_its_file(self) -> None:
        assert dir(model) == sorted(model.__all__)
        for name in model.__all__:
            assert getattr(model, name).__name__ == name
        assert model.build_model is build_model
        assert model.DetrConfig is DetrConfig
        assert model.postprocess is postprocess, "the function, also where its file was imported before"

    def test_another_name_is_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match="module 'model' has no attribute 'nothing'"):
            _ = model.nothing
