"""Batches of images of different sizes: padded to one canvas, with a mask that says what is padding.

`PixelBatch` is what a loader makes: bytes, on the host. `ImageBatch` is what a model takes: normalised, on its device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.config import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class ImageBatch:
    """Images that are ready for a model."""

    pixels: Tensor
    """[batch, 3, height, width] float, normalised with the ImageNet mean and std, 0 on padding."""
    mask: Tensor
    """[batch, height, width] bool, True on padding."""

    def mask_at(self, height: int, width: int) -> Tensor:
        """The mask of a feature map, `[batch, height, width]`: nearest, always from the full resolution."""
        return F.interpolate(self.mask[:, None].float(), size=(height, width)).to(torch.bool)[:, 0]


@dataclass(frozen=True)
class PixelBatch:
    """Images as bytes on one canvas, padded to the right and below."""

    pixels: Tensor
    """[batch, 3, height, width] uint8 RGB, 0 on padding; a pixel's bytes lie together, as a decoder gives them."""
    mask: Tensor
    """[batch, height, width] bool, True on padding."""

    @classmethod
    def collate(cls, images: Sequence[NDArray[np.uint8]], multiple: int = 1) -> "PixelBatch":
        """Pad images to the largest height and width among them.

        Args:
            images: RGB `[height, width, 3]` uint8 each.
            multiple: of this many pixels are the height and the width of the canvas.

        Raises:
            ValueError: there is no image, or one is not RGB uint8 with at least one pixel.
        """
        if not images:
            raise ValueError("a batch needs at least one image")
        for index, image in enumerate(images):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
                raise ValueError(f"image {index} of the batch is {image.dtype} {image.shape}, expected uint8 (h, w, 3)")
        batch, places = cls.of_sizes([image.shape[1::-1] for image in images], multiple)
        for image, place in zip(images, places, strict=True):
            place[:] = image
        return batch

    @classmethod
    def of_sizes(
        cls, sizes: Sequence[tuple[int, ...]], multiple: int = 1
    ) -> tuple["PixelBatch", list[NDArray[np.uint8]]]:
        """A batch whose images are still to be written, and of each its place there, uint8 `[height, width, 3]`.

        Args:
            sizes: (width, height) of each image, at least one pixel.
            multiple: as of `collate`.
        """
        width, height = (-(-max(sides) // multiple) * multiple for sides in zip(*sizes, strict=True))
        canvas = np.empty((len(sizes), height, width, 3), dtype=np.uint8)
        mask = np.zeros((len(sizes), height, width), dtype=np.bool_)
        for index, (w, h) in enumerate(sizes):
            for array, padding in ((canvas, 0), (mask, True)):
                array[index, h:] = padding
                array[index, :h, w:] = padding
        places = [canvas[index, :h, :w] for index, (w, h) in enumerate(sizes)]
        return cls(torch.from_numpy(canvas).permute(0, 3, 1, 2), torch.from_numpy(mask)), places

    def pin_memory(self) -> "PixelBatch":
        """The same in page-locked memory, from which a copy to a GPU does not block (`DataLoader` calls this)."""
        return PixelBatch(self.pixels.pin_memory(), self.mask.pin_memory())

    def to(self, device: torch.device | str) -> ImageBatch:
        """Copy the bytes to `device` and normalise them there."""
        pixels = self.pixels.to(device, non_blocking=True).contiguous()
        mask = self.mask.to(device, non_blocking=True)
        mean = torch.tensor(IMAGENET_MEAN).mul_(255).view(3, 1, 1).to(device, non_blocking=True)
        scale = torch.tensor(IMAGENET_STD).mul_(255).reciprocal_().view(3, 1, 1).to(device, non_blocking=True)
        normalised = (pixels.float() - mean).mul_(scale).masked_fill_(mask[:, None], 0.0)
        return ImageBatch(normalised, mask)
