"""Encoded images: their header, whether they are whole, their pixels."""

import base64
import io
import os
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.data.images import (
    EXIF_ASSUMED,
    EXIF_IGNORED,
    MOST_BYTES,
    BadImageError,
    decode_image,
    inspect_image,
    jpeg_address,
    read_image_file,
    shown_size,
)
from pipeline.predict.detector import read_picture
from tests.builders import make_image, write_image


def encoded(pixels: NDArray[np.uint8], mode: str = "RGB", kind: str = "PNG", orientation: int | None = None) -> bytes:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    content = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(content, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    return content.getvalue()


class TestDecoding:
    @pytest.mark.parametrize(
        ("mode", "kind"),
        [
            pytest.param("L", "PNG", id="grey png"),
            pytest.param("L", "JPEG", id="grey jpeg"),
            pytest.param("RGBA", "PNG", id="rgba"),
            pytest.param("LA", "PNG", id="grey with alpha"),
            pytest.param("P", "PNG", id="palette"),
            pytest.param("1", "PNG", id="one bit"),
            pytest.param("CMYK", "JPEG", id="cmyk"),
            pytest.param("RGB", "JPEG", id="rgb jpeg"),
            pytest.param("RGB", "PNG", id="rgb png"),
        ],
    )
    def test_every_mode_gives_the_rgb_of_pillow(self, mode: str, kind: str) -> None:
        content = encoded(make_image(40, 30), mode, kind)
        decoded = decode_image(content, 40, 30)
        expected = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
        np.testing.assert_array_equal(decoded, expected)

    def test_cmyk_has_the_colours_of_the_original(self) -> None:
        pixels = make_image(40, 30)
        decoded = decode_image(encoded(pixels, "CMYK", "JPEG"), 40, 30)
        assert np.abs(decoded.astype(int) - pixels).mean() < 4

    def test_grey_of_16_bits_keeps_its_range(self) -> None:
        grey = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)
        content = io.BytesIO()
        Image.fromarray(grey).save(content, "PNG")
        decoded = decode_image(content.getvalue(), 40, 30)
        assert np.abs(decoded[..., 0].astype(int) - grey // 257).max() <= 1

    def test_real_jpegs_decode_as_pillow_decodes(self, shared_data: Path) -> None:
        for path in sorted((shared_data / "tiny_coco" / "train2017").iterdir())[:8]:
            with Image.open(path) as image:
                expected = np.array(image.convert("RGB"))
            decoded = decode_image(path.read_bytes(), expected.shape[1], expected.shape[0])
            np.testing.assert_array_equal(decoded, expected)


class TestExifRotation:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG"])
    @pytest.mark.parametrize("orientation", [5, 6, 7, 8])
    def test_applied_when_the_size_is_the_rotated_one(self, orientation: int, kind: str) -> None:
        pixels = make_image(40, 24)
        turns = {5: pixels.transpose(1, 0, 2), 6: np.rot90(pixels, -1), 8: np.rot90(pixels)}
        turns[7] = np.rot90(turns[5], 2)
        decoded = decode_image(encoded(pixels, kind=kind, orientation=orientation), 24, 40)
        assert decoded.shape == (40, 24, 3)
        assert np.abs(decoded.astype(int) - turns[orientation]).mean() <= (0 if kind == "PNG" else 3)

    def test_applied_when_the_size_cannot_tell(self) -> None:
        pixels = make_image(40, 24)
        content = encoded(pixels, orientation=3)
        np.testing.assert_array_equal(decode_image(content, 40, 24), pixels[::-1, ::-1])
        assert inspect_image(content, 40, 24).note == EXIF_ASSUMED

    @pytest.mark.parametrize("orientation", [6])
    def test_not_applied_when_the_size_is_the_stored_one(self, orientation: int) -> None:
        pixels = make_image(40, 24)
        np.testing.assert_array_equal(decode_image(encoded(pixels, orientation=orientation), 40, 24), pixels)

    @pytest.mark.parametrize(
        ("orientation", "size"),
        [pytest.param(None, (24, 40), id="swapped without EXIF"), pytest.param(3, (24, 40), id="swapped, half turn"),
         pytest.param(6, (41, 24), id="neither")],
    )  # fmt: skip
    def test_another_size_is_refused(self, orientation: int | None, size: tuple[int, int]) -> None:
        with pytest.raises(
            BadImageError, match=rf"40x24 pixels, the annotation file says {size[0]}x{size[1]}"
        ) as caught:
            inspect_image(encoded(make_image(40, 24), orientation=orientation), *size)
        assert caught.value.rule == "image_size_mismatch"


class TestDamagedImages:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG"])
    @pytest.mark.parametrize("kept", [0.5, 0.9, 0.99])
    def test_cut_off(self, kind: str, kept: float) -> None:
        content = encoded(make_image(64, 64), kind=kind)
        with pytest.raises(BadImageError) as caught:
            inspect_image(content[: int(len(content) * kept)], 64, 64)
        assert caught.value.rule == "image_truncated"

    def test_an_embedded_thumbnail_does_not_hide_a_cut(self) -> None:
        content = encoded(make_image(64, 64), kind="JPEG")
        thumbnail = encoded(make_image(8, 8), kind="JPEG")
        segment = b"\xff\xe3" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
        whole = content[:2] + segment + content[2:]
        inspect_image(whole, 64, 64)
        with pytest.raises(BadImageError, match="cut off"):
            inspect_image(whole[:-40], 64, 64)

    def test_bytes_after_the_end_are_legal(self) -> None:
        for kind in ("JPEG", "PNG"):
            decode_image(encoded(make_image(), kind=kind) + b"\0\0trailing", 32, 24)

    def test_progressive_jpeg_is_legal(self) -> None:
        content = io.BytesIO()
        Image.fromarray(make_image(64, 48)).save(content, "JPEG", progressive=True)
        assert decode_image(content.getvalue(), 64, 48).shape == (48, 64, 3)

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            pytest.param(b"", "not a JPEG or PNG", id="empty"),
            pytest.param(b"<html>", "not a JPEG or PNG", id="a web page"),
            pytest.param(encoded(make_image(), kind="GIF"), "it is a GIF file; convert it", id="gif"),
        ],
    )
    def test_no_image(self, content: bytes, told: str) -> None:
        with pytest.raises(BadImageError, match=told) as caught:
            decode_image(content, 32, 24)
        assert caught.value.rule == "image_unreadable"

    def test_damaged_pixels_are_found_by_decoding(self) -> None:
        content = bytearray(encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
        middle = len(content) // 2
        content[middle : middle + 64] = bytes(64)
        inspect_image(bytes(content), 64, 64)
        with pytest.raises(BadImageError) as caught:
            decode_image(bytes(content), 64, 64)
        assert caught.value.rule == "image_unreadable"


def encoded_as(kind: str, mode: str = "RGB", orientation: int = 1, **options: Any) -> bytes:
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
    content = encoded_as(kind, mode, **options)
    expected = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    assert inspect_image(content, 40, 24).extension == extension
    np.testing.assert_array_equal(decode_image(content, 40, 24), expected)
    np.testing.assert_array_equal(read_picture(content), expected)


@pytest.mark.parametrize(("kind", "mode", "options", "extension"), FORMATS)
def test_half_a_file_is_told(kind: str, mode: str, options: Any, extension: str) -> None:
    content = encoded_as(kind, mode, **options)
    with pytest.raises(BadImageError) as caught:
        decode_image(content[: len(content) // 2], 40, 24)
    assert "BytesIO" not in str(caught.value)
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_a_viewer_shows_it(kind: str, orientation: int) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded_as(kind, orientation=orientation, **options)
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    assert shown_size(content) == (expected.shape[1], expected.shape[0])
    np.testing.assert_array_equal(read_picture(content), expected)
    np.testing.assert_array_equal(decode_image(content, *shown_size(content)), expected)


@pytest.mark.parametrize(
    ("orientation", "size", "note"),
    [(1, (40, 24), None), (3, (40, 24), EXIF_ASSUMED), (6, (24, 40), None), (6, (40, 24), EXIF_IGNORED)],
)
def test_what_the_size_says_of_exif(orientation: int, size: tuple[int, int], note: str | None) -> None:
    assert inspect_image(encoded_as("JPEG", orientation=orientation), *size).note == note


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
        whole = encoded_as("JPEG", mode, quality=95)
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

        content = encoded_as("JPEG")
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


@pytest.mark.parametrize(
    ("size", "most", "expected"), [((40, 20), 40, (40, 20)), ((40, 20), 10, (10, 5)), ((400, 1), 8, (8, 1))]
)
def test_a_picture_as_an_address(size: tuple[int, int], most: int, expected: tuple[int, int]) -> None:
    pixels = make_image(*size)
    address = jpeg_address(pixels, most)
    kind, _, content = address.partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert picture.size == expected
        if expected == size:
            assert np.abs(np.asarray(picture).astype(int) - pixels).mean() < 5
