import numpy as np
import pytest
import torch

from model.batch import PixelBatch
from model.config import IMAGENET_MEAN, IMAGENET_STD
from tests.builders import make_image


def test_images_are_padded_right_and_below() -> None:
    wide, tall = make_image(40, 20), make_image(10, 30, seed=1)
    batch = PixelBatch.collate([wide, tall])
    assert batch.pixels.shape == (2, 3, 30, 40)
    assert batch.pixels.dtype == torch.uint8
    assert not batch.mask[0, :20].any()
    assert batch.mask[0, 20:].all()
    assert not batch.mask[1, :, :10].any()
    assert batch.mask[1, :, 10:].all()
    np.testing.assert_array_equal(batch.pixels[1, :, :, :10].permute(1, 2, 0).numpy(), tall)
    assert not batch.pixels[1, :, :, 10:].any()


def test_what_a_model_takes_is_laid_out_by_channel() -> None:
    assert PixelBatch.collate([make_image(8, 6), make_image(9, 7)]).to("cpu").pixels.is_contiguous()


def test_normalised_with_zero_padding() -> None:
    image = make_image(8, 6)
    ready = PixelBatch.collate([image, make_image(9, 7)]).to("cpu")
    expected = (image / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    np.testing.assert_allclose(ready.pixels[0, :, :6, :8].permute(1, 2, 0).numpy(), expected, atol=1e-6)
    assert not ready.pixels[0].masked_select(ready.mask[0]).any()


def test_read_only_and_flipped_images_are_taken() -> None:
    image = make_image(8, 6)
    image.setflags(write=False)
    batch = PixelBatch.collate([image[:, ::-1]])
    np.testing.assert_array_equal(batch.pixels[0].permute(1, 2, 0).numpy(), image[:, ::-1])


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(np.zeros((4, 4), np.uint8), id="grey"),
        pytest.param(np.zeros((4, 4, 4), np.uint8), id="rgba"),
        pytest.param(np.zeros((4, 4, 3), np.float32), id="float"),
        pytest.param(np.zeros((0, 4, 3), np.uint8), id="no pixel"),
    ],
)
def test_other_images_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="image 1 of the batch"):
        PixelBatch.collate([make_image(), image])


def test_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        PixelBatch.collate([])


def test_places_of_a_batch_are_its_pixels() -> None:
    """Written in place, a batch is what `collate` makes of the same images."""
    choose = np.random.default_rng(0)
    images = [choose.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in ((33, 20), (10, 64), (64, 1))]
    batch, places = PixelBatch.of_sizes([image.shape[1::-1] for image in images], multiple=32)
    for place, image in zip(places, images, strict=True):
        place[:] = image
    expected = PixelBatch.collate(images, multiple=32)
    assert batch.pixels.shape == (3, 3, 64, 64)
    assert torch.equal(batch.pixels, expected.pixels)
    assert torch.equal(batch.mask, expected.mask)
    for index, image in enumerate(images):
        height, width = image.shape[:2]
        assert torch.equal(batch.pixels[index, :, :height, :width], torch.from_numpy(image).permute(2, 0, 1))
        assert not batch.pixels[index, :, height:].any()
        assert not batch.pixels[index, :, :, width:].any()
        assert not batch.mask[index, :height, :width].any()
        assert int(batch.mask[index].sum()) == 64 * 64 - height * width
