"""What a registered detector answers: forms of pictures, and those that cannot be used."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config.sections import EvaluateSection
from pipeline.data.labels import Category, LabelMap
from pipeline.errors import UserError
from pipeline.predict import answers
from pipeline.predict.answers import answer, check_request, pictures_in
from pipeline.predict.detector import Detector
from tests.builders import make_image, write_checkpoint

LABELS = LabelMap("contiguous", (Category(3, "cat"), Category(90, "dog")))
PIXELS = make_image(50, 40)


def encoded(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


FILE = encoded(PIXELS)
TEXT = base64.b64encode(FILE).decode()


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    section = EvaluateSection(short_side=40, max_side=60, max_detections=5)
    return Detector.from_checkpoint(write_checkpoint(tmp_path_factory.mktemp("run"), LABELS), section)


@pytest.mark.parametrize(
    "picture",
    [
        pytest.param(FILE, id="bytes"),
        pytest.param(bytearray(FILE), id="bytearray"),
        pytest.param(np.bytes_(FILE), id="bytes of numpy"),
        pytest.param(TEXT, id="base64"),
        pytest.param(base64.encodebytes(FILE).decode(), id="base64 in lines"),
        pytest.param(f"data:image/png;base64,{TEXT}", id="data address"),
        pytest.param(PIXELS, id="array"),
        pytest.param(PIXELS.astype(np.int64), id="array of integers"),
        pytest.param(PIXELS.tolist(), id="lists"),
    ],
)
def test_forms_of_a_picture(detector: Detector, picture: Any) -> None:
    expected = detector(PIXELS, 0.001)
    assert len(expected) == 5
    assert answer(detector, [picture], 0.001) == [{"detections": expected, "error": None}]


def test_a_path_is_read(detector: Detector, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(FILE)
    assert answer(detector, [path], 0) == answer(detector, [FILE], 0)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        pytest.param(b"", "not a picture", id="empty"),
        pytest.param(FILE[:-20], "cut off", id="cut off"),
        pytest.param(b"GIF89a", "not a picture", id="another format"),
        pytest.param("/etc/hostname", "opens no paths", id="path as text"),
        pytest.param(TEXT[:-2], "not the base64", id="base64 cut off"),
        pytest.param("\u00e4", "not the base64", id="not ASCII"),
        pytest.param(TEXT[:-20] + "AA==", "not a picture|cut off", id="base64 of a cut file"),
        pytest.param(None, "not NoneType", id="nothing"),
        pytest.param(5, "not int", id="a number"),
        pytest.param(Path("/nowhere/picture.png"), r"^picture\.png: cannot be read", id="missing file"),
        pytest.param(Path("/dev"), "^dev: cannot be read", id="a folder"),
        pytest.param(PIXELS[..., 0], "not uint8", id="grey array"),
        pytest.param(PIXELS / 255, "not float64", id="array of floats"),
        pytest.param(PIXELS.astype(int) + 255, "0 to 255", id="array above 255"),
        pytest.param([[[1, 2, 3]], [[1, 2]]], "not a picture", id="ragged lists"),
        pytest.param([], "not a picture", id="no lists"),
        pytest.param(np.empty((0, 4, 3), np.uint8), "not a picture", id="no pixels"),
    ],
)
def test_a_bad_picture_is_told_beside_good_ones(detector: Detector, picture: Any, message: str) -> None:
    good, bad, other = answer(detector, [FILE, picture, FILE], 0.001)
    assert bad["detections"] == []
    assert re.search(message, bad["error"])
    assert "/" not in bad["error"]
    assert good == other == {"detections": detector(PIXELS, 0.001), "error": None}


def test_a_detector_that_fails_tells_no_more_than_that(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("/srv/secret: out of memory")

    monkeypatch.setattr(answers, "_readable", fail)
    told = "the detector failed at this picture (RuntimeError)"
    assert answer(detector, [FILE]) == [{"detections": [], "error": told}]


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_that_is_none(detector: Detector, threshold: float) -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        answer(detector, [FILE], threshold)


def test_threshold(detector: Detector) -> None:
    everything = detector(PIXELS)
    for threshold in (everything[2]["score"], 1.0):
        (given,) = answer(detector, [FILE], threshold)
        assert given["detections"] == [entry for entry in everything if entry["score"] >= threshold]
    assert answer(detector, [FILE]) == answer(detector, [FILE], answers.THRESHOLD)


def test_pictures_of_a_cell() -> None:
    assert pictures_in(["a", "b"]) == pictures_in(np.array(["a", "b"])) == ["a", "b"]
    assert pictures_in("a") == ["a"]
    for cell in (PIXELS, PIXELS.tolist(), [], None):
        assert pictures_in(cell)[0] is cell


def test_requests_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_request([TEXT] * answers.MOST_PICTURES)
    with pytest.raises(UserError, match="no picture"):
        check_request([])
    with pytest.raises(UserError, match="65 pictures in one request, and 64 may be"):
        check_request([TEXT] * 65)
    monkeypatch.setattr(answers, "MOST_BYTES", 2 * len(TEXT) - 1)
    with pytest.raises(UserError, match="bytes in one request"):
        check_request([TEXT, TEXT])
