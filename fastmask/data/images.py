"""Pixels: an image folder, or an `.npz` of images."""

import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmask.data.npz import Arrays
from fastmask.kernels import random_uniform

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
_MIRROR_STREAM = 5

Pixels = NDArray[np.uint8]


def resize_and_crop(image: Any, size: int) -> Any:
    """Return the centre square of a Pillow image at a side of ``size``, resized as ADM does it (arXiv 2105.05233).

    The short side is halved by box averages while it is at least twice the size, then resized bicubically.
    """
    resampling = _pillow().Resampling
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
        return _pillow().fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("what is black and white in its 32-bit pixels is unknown: store it with 8 or 16 bits")
    return image.convert("RGB")


def decode(content: bytes, size: int, name: str, *, still: bool = False) -> Pixels:
    """Return the pixels (size, size, 3) of an image file's content, resized and cropped as `resize_and_crop` does.

    Args:
        content: of the file, of any format that Pillow tells by its first bytes.
        size: side.
        name: of the file, for messages.
        still: refuse an image of several frames, of which the first is taken otherwise.

    Raises:
        ValueError: it is damaged, or no image.
    """
    pillow = _pillow()
    try:
        with pillow.open(io.BytesIO(content)) as image:
            frames = getattr(image, "n_frames", 1)
            if still and frames > 1:
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

    def to_images(self, stored: Tensor, seed: int, sample: Tensor) -> Tensor:
        """Return the images in [-1, 1], some of them mirrored."""
        return images_of(stored, seed, sample, self._mirror)


class ImageFolder:
    """A folder of images in sub-folders, one per class, or of images alone, decoded when read, as a `DataSet`."""

    def __init__(self, path: Path, image_size: int, num_classes: int | None, mirror: bool) -> None:
        _pillow()
        folders = sorted(entry for entry in path.iterdir() if entry.is_dir())
        loose = [entry for entry in sorted(path.iterdir()) if entry.suffix.lower() in SUFFIXES and entry.is_file()]
        found = [(folder, _images_below(folder)) for folder in folders]
        classes = [(folder.name, files) for folder, files in found if files]
        if loose and classes:
            raise ValueError(f"{path} holds images beside its class folders ({loose[0].name}): move them into one")
        if not loose and not classes:
            raise ValueError(f"{path} holds no images: expected {path}/CLASS/IMAGE.png (or .jpg, .webp, ...)")
        if num_classes and len(classes) > num_classes:
            raise ValueError(f"{path} has {len(classes)} class folders, more than num_classes {num_classes}")
        if num_classes and not classes:
            raise ValueError(f"{path} has no class folders, which num_classes {num_classes} asks for")
        self._files = loose or [file for _, files in classes for file in files]
        if num_classes == 0:
            classes = []
        counts = [len(files) for _, files in classes]
        self._labels = torch.repeat_interleave(torch.tensor(counts or [len(self._files)]))
        self._size, self._mirror = image_size, mirror
        self.shape = (3, image_size, image_size)
        self.num_classes = len(classes) if num_classes is None else num_classes
        self.class_names = [name for name, _ in classes]
        self.class_names += [str(label) for label in range(len(classes), self.num_classes)]
        self._decode(self._files[0])  # a folder of something else fails here, not in the middle of an epoch

    def __len__(self) -> int:
        return len(self._files)

    def read(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return the images, uint8 (B, 3, H, W), and labels (B,) of these ids; an unreadable file is a ValueError."""
        pixels = np.stack([self._decode(self._files[i]) for i in ids])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), self._labels[ids]

    def to_images(self, stored: Tensor, seed: int, sample: Tensor) -> Tensor:
        """Return the images in [-1, 1], some of them mirrored."""
        return images_of(stored, seed, sample, self._mirror)

    def _decode(self, file: Path) -> Pixels:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ValueError(f"{file} cannot be read as an image: {error}") from error
        return decode(content, self._size, str(file))


def _images_below(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())


def resize_all(images: Pixels, size: int) -> Pixels:
    """Return images (N, H, W, C), C of 1 or 3, at another side, resized and cropped as `resize_and_crop` does."""
    pillow = _pillow()
    plain = images[..., 0] if images.shape[3] == 1 else images
    resized = [np.asarray(resize_and_crop(pillow.fromarray(image), size)) for image in plain]
    return np.stack(resized).reshape(len(images), size, size, images.shape[3])


def _pillow() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ModuleNotFoundError as error:
        raise ValueError("reading images needs pillow: pip install 'fastmask[data]'") from error
