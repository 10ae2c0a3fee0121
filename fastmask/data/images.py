"""Pixels: how an image becomes them, and an `.npz` of them."""

import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmask.data.fingerprint import of_arrays
from fastmask.data.npz import Arrays
from fastmask.kernels import random_uniform

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
_MIRROR_STREAM = 5

Pixels = NDArray[np.uint8]


def resize_and_crop(image: Any, size: int) -> Any:
    """Return the centre square of a Pillow image at a side of ``size``, resized as ADM does it (arXiv 2105.05233).

    The short side is halved by box averages while it is at least twice the size, then resized bicubically.
    """
    resampling = load_pillow().Resampling
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_rgb(image: Any) -> Any:
    """Return a Pillow image with 8 bits of red, green and blue; transparency is dropped.

    Pillow's own conversion would clip 16-bit pixels at 255.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return load_pillow().fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("what is black and white in its 32-bit pixels is unknown: store it with 8 or 16 bits")
    return image.convert("RGB")


def decode(content: bytes, size: int, name: str) -> Pixels:
    """Return the pixels (size, size, 3) of an image file's content, resized and cropped as `resize_and_crop` does.

    Args:
        content: of the file, of any format that Pillow tells by its first bytes.
        size: side.
        name: of the file, for messages.

    Raises:
        ValueError: it is damaged, no image, or of several frames; but of an MPO, a photo with more views, the first is
            taken.
    """
    pillow = load_pillow()
    try:
        with pillow.open(io.BytesIO(content)) as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # a photo, before views or a preview that cameras add
                raise ValueError(f"it has {frames} frames: keep one of them as an image of its own")
            return np.asarray(resize_and_crop(to_rgb(image), size))
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        unknown = isinstance(error, pillow.UnidentifiedImageError)
        reason = "it is empty, damaged or of another format" if unknown else error
        raise ValueError(f"{name} cannot be read as an image: {reason}") from error


def images_of(stored: Tensor, seed: int, sample: Tensor, mirror: bool) -> Tensor:
    """Return pixels, uint8 (B, C, H, W), as floats in [-1, 1]; with ``mirror`` about half of them mirrored.

    Which ones is a function of the seed and of ``sample``, the global index of each, int64 (B,).
    """
    images = stored.float() / 127.5 - 1
    if not mirror:
        return images
    flip = random_uniform(seed, sample, 1, _MIRROR_STREAM)[:, 0] < 0.5
    return torch.where(flip[:, None, None, None], images.flip(3), images)


class ImageArray:
    """An `.npz` of images, uint8, shape (N, H, W, C) with C of 1 or 3 or (N, H, W), kept in memory, as a `DataSet`.

    Images of another side than ``image_size`` are resized and cropped when the file is opened.
    """

    def __init__(self, path: Path, arrays: Arrays, image_size: int, mirror: bool) -> None:
        images = arrays["images"]
        if images.ndim == 3:
            images = images[..., None]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
            raise ValueError(
                f"{path}: `images` must be uint8 of shape (N, H, W, 3), (N, H, W, 1) or (N, H, W), not "
                f"{arrays['images'].dtype} of shape {tuple(arrays['images'].shape)}"
            )
        if images.shape[1:3] != (image_size, image_size):
            images = resize_all(images, image_size)
        self._images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        self._labels = torch.from_numpy(arrays.get("labels", np.zeros(len(images), np.int64)))
        self._mirror = mirror
        self.shape = (images.shape[3], image_size, image_size)
        self.num_classes = int(arrays.get("num_classes", 0))
        self.class_names = [str(label) for label in range(self.num_classes)]

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return the images, uint8 (B, C, H, W), and labels (B,) of these ids."""
        index = torch.from_numpy(ids)  # which copies whole records, where an index in brackets goes value by value
        return self._images.index_select(0, index), self._labels.index_select(0, index)

    def fingerprint(self) -> str:
        """Return what tells these images and labels from others."""
        return of_arrays(self._images.numpy(), self._labels.numpy())

    def to_images(self, stored: Tensor, seed: int, sample: Tensor) -> Tensor:
        """Return the images in [-1, 1], some of them mirrored."""
        return images_of(stored, seed, sample, self._mirror)


def resize_all(images: Pixels, size: int) -> Pixels:
    """Return images (N, H, W, C), C of 1 or 3, at another side, resized and cropped as `resize_and_crop` does."""
    pillow = load_pillow()
    plain = images[..., 0] if images.shape[3] == 1 else images
    resized = [np.asarray(resize_and_crop(pillow.fromarray(image), size)) for image in plain]
    return np.stack(resized).reshape(len(images), size, size, images.shape[3])


def load_pillow() -> Any:
    """Return `PIL.Image`; a ValueError if Pillow is not installed."""
    try:
        return importlib.import_module("PIL.Image")
    except ModuleNotFoundError as error:
        raise ValueError("reading images needs pillow: pip install pillow") from error
