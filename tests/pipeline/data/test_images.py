"""Encoded images: their header, whether they are whole, their pixels."""

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.images import EXIF_ASSUMED, BadImageError, decode_image, inspect_image
from tests.builders import make_image


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
