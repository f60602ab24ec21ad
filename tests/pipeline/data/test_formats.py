"""Damaged pictures, formats besides JPEG and PNG, 16 bits and EXIF: the same in training and in prediction."""

import io
import os
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from pipeline.data.images import (
    EXIF_ASSUMED,
    EXIF_IGNORED,
    MOST_BYTES,
    BadImageError,
    decode_image,
    inspect_image,
    read_image_file,
    shown_size,
)
from pipeline.predict.detector import read_picture
from tests.builders import make_image, write_image


def encoded(kind: str, mode: str = "RGB", orientation: int = 1, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = io.BytesIO()
    Image.fromarray(make_image(40, 24)).convert(mode).save(content, kind, exif=exif, **options)
    return content.getvalue()


FORMATS = [
    pytest.param("WEBP", "RGB", {"lossless": True}, "webp", id="webp lossless"),
    pytest.param("WEBP", "RGB", {}, "webp", id="webp"),
    pytest.param("WEBP", "RGBA", {"lossless": True}, "webp", id="webp with alpha"),
    pytest.param("BMP", "RGB", {}, "bmp", id="bmp"),
    pytest.param("BMP", "P", {}, "bmp", id="bmp palette"),
    pytest.param("BMP", "1", {}, "bmp", id="bmp one bit"),
    pytest.param("TIFF", "RGB", {}, "tif", id="tiff"),
    pytest.param("TIFF", "L", {"compression": "tiff_lzw"}, "tif", id="tiff grey lzw"),
    pytest.param("TIFF", "CMYK", {}, "tif", id="tiff cmyk"),
    pytest.param("TIFF", "P", {}, "tif", id="tiff palette"),
]


@pytest.mark.parametrize(("kind", "mode", "options", "extension"), FORMATS)
def test_formats_decode_as_pillow_decodes(kind: str, mode: str, options: Any, extension: str) -> None:
    content = encoded(kind, mode, **options)
    expected = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    assert inspect_image(content, 40, 24).extension == extension
    np.testing.assert_array_equal(decode_image(content, 40, 24), expected)
    np.testing.assert_array_equal(read_picture(content), expected)


@pytest.mark.parametrize(("kind", "mode", "options", "extension"), FORMATS)
def test_half_a_file_is_told(kind: str, mode: str, options: Any, extension: str) -> None:
    content = encoded(kind, mode, **options)
    with pytest.raises(BadImageError) as caught:
        decode_image(content[: len(content) // 2], 40, 24)
    assert "BytesIO" not in str(caught.value)
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_a_viewer_shows_it(kind: str, orientation: int) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(kind, orientation=orientation, **options)
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    assert shown_size(content) == (expected.shape[1], expected.shape[0])
    np.testing.assert_array_equal(read_picture(content), expected)
    np.testing.assert_array_equal(decode_image(content, *shown_size(content)), expected)


@pytest.mark.parametrize(
    ("orientation", "size", "note"),
    [(1, (40, 24), None), (3, (40, 24), EXIF_ASSUMED), (6, (24, 40), None), (6, (40, 24), EXIF_IGNORED)],
)
def test_what_the_size_says_of_exif(orientation: int, size: tuple[int, int], note: str | None) -> None:
    assert inspect_image(encoded("JPEG", orientation=orientation), *size).note == note


@pytest.mark.parametrize("extension", [".png", ".tif"])
@pytest.mark.parametrize("orientation", [1, 3])
def test_16_bits_are_the_upper_byte_everywhere(extension: str, orientation: int, tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 40 * 24).reshape(24, 40).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{extension}"
    Image.fromarray(grey).save(path, exif=exif)
    expected = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    expected = expected[::-1, ::-1] if orientation == 3 else expected
    np.testing.assert_array_equal(decode_image(path.read_bytes(), 40, 24), expected)
    np.testing.assert_array_equal(read_picture(path.read_bytes()), expected)


def test_32_bit_samples_are_refused() -> None:
    content = io.BytesIO()
    Image.fromarray(np.zeros((4, 5), dtype=np.float32)).save(content, "TIFF")
    with pytest.raises(BadImageError, match="32 bits"):
        decode_image(content.getvalue(), 5, 4)


class TestStrictJpeg:
    @pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
    def test_half_with_an_end_marker(self, mode: str) -> None:
        whole = encoded("JPEG", mode, quality=95)
        content = whole[: len(whole) * 2 // 3] + b"\xff\xd9"
        inspect_image(content, 40, 24)
        with pytest.raises(BadImageError, match="damaged"):
            decode_image(content, 40, 24)

    @pytest.mark.parametrize("name", ["half_jpeg_eoi/images/1.jpg", "pictures/zeroed_middle.jpg"])
    def test_the_reported_files(self, shared_data: Path, name: str) -> None:
        content = (shared_data / "dirty" / name).read_bytes()
        with pytest.raises(BadImageError, match="damaged"):
            decode_image(content, *shown_size(content))

    @pytest.mark.parametrize("folder", ["tiny_coco/train2017", "bccd/images"])
    def test_pixels_are_opencv_s(self, shared_data: Path, folder: str) -> None:
        for path in sorted((shared_data / folder).glob("*.jpg"))[:10]:
            content = path.read_bytes()
            expected = cv2.imdecode(
                np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
            )
            np.testing.assert_array_equal(decode_image(content, *shown_size(content)), expected)

    def test_a_kind_that_simplejpeg_does_not_take(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise ValueError("Unsupported")

        content = encoded("JPEG")
        expected = decode_image(content, 40, 24)
        monkeypatch.setattr(simplejpeg, "decode_jpeg", refuse)
        np.testing.assert_array_equal(decode_image(content, 40, 24), expected)


class TestFiles:
    def test_a_pipe_does_not_wait(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.jpg")
        with pytest.raises(BadImageError, match="not a regular file"):
            read_image_file(tmp_path / "a.jpg")

    def test_a_device(self) -> None:
        with pytest.raises(BadImageError, match="not a regular file"):
            read_image_file(Path("/dev/zero"))

    def test_a_huge_file(self, tmp_path: Path) -> None:
        path = write_image(tmp_path / "a.jpg")
        os.truncate(path, MOST_BYTES + 1)
        with pytest.raises(BadImageError, match=re.escape(f"{MOST_BYTES + 1} bytes")):
            read_image_file(path)
