"""Pixels: how an image becomes them, and an `.npz` of them."""

import contextlib
import importlib
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmask.kernels import random_uniform

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})


MAX_ASPECT = 20  # of the sides of an image


_FLIP_STREAM = 5


# Those of SUFFIXES: Pillow would hand others, such as EPS, to programs outside. JPEG includes MPO.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


# What Pillow raises of damaged files, beside its DecompressionBombError.
_DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    AttributeError,
    AssertionError,
    LookupError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zlib.error,
)


_ORIENTATION = 0x0112  # Exif's tag


_TURNS = {  # by its value, as Pillow's Transpose names them
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


Pixels = NDArray[np.uint8]


def resize_and_crop(image: Any, size: int) -> Any:
    """Return the centre square of a Pillow image at a side of ``size``, resized as ADM does it (arXiv 2105.05233).

    The short side is halved by box averages while it is at least twice the size, then resized bicubically.
    """
    check_aspect(image.size)
    resampling = load_pillow().Resampling
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def check_aspect(size: tuple[int, int]) -> None:
    """Raise a ValueError if an image of this width and height is not one to train on, but a strip."""
    short, long = sorted(size)
    if long > MAX_ASPECT * short:
        # The short side would be enlarged with the long one, to gigabytes, of which the crop shows next to nothing.
        raise ValueError(f"it has {size[0]} x {size[1]} pixels: one side is more than {MAX_ASPECT} times the other")


def to_rgb(image: Any) -> Any:
    """Return a Pillow image with 8 bits of red, green and blue, over white where it is transparent.

    Pillow's own conversion would clip 16-bit pixels at 255, and show whatever colour lies under transparent ones.
    """
    pillow = load_pillow()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image)
        if "transparency" in image.info:
            values = np.where(values == image.info["transparency"], 65535, values)
        return pillow.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("what is black and white in its 32-bit pixels is unknown: store it with 8 or 16 bits")
    palette = image.palette.mode if image.palette else ""
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or palette.endswith("A"):
        image = image.convert("RGBA")
        return pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


@contextlib.contextmanager
def opened(content: bytes, name: str) -> Iterator[Any]:
    """Yield an image file's content as a Pillow image whose pixels are still to be decoded.

    Args:
        content: of the file, of a format that `SUFFIXES` names, told by its first bytes.
        name: of the file, for messages.

    Raises:
        ValueError: it is damaged, no image, too large or a strip, or of several frames; but of an MPO, a photo with
            more views, the first is taken. Errors inside the block become one as well.
    """
    pillow = load_pillow()
    try:
        with pillow.open(io.BytesIO(content), formats=_FORMATS) as image:
            check_aspect(image.size)
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # a photo, before views or a preview that cameras add
                raise ValueError(f"it has {frames} frames: keep one of them as an image of its own")
            yield image
    except (*_DAMAGED, pillow.DecompressionBombError) as error:
        unknown = isinstance(error, pillow.UnidentifiedImageError)
        reason = "it is empty, damaged or of another format" if unknown else error or type(error).__name__
        raise ValueError(f"{name} cannot be read as an image: {reason}") from error


def orientation(image: Any) -> int:
    """Return how a Pillow image is to be turned to be seen, as Exif counts it; 1 where it lies right or nothing says.

    Formats that put it behind the pixels, or are turned by Pillow when those are decoded, must have been loaded.
    """
    try:
        turned = image.getexif().get(_ORIENTATION, 1)
    except _DAMAGED:
        return 1
    return turned if turned in _TURNS else 1


def decode(content: bytes, size: int, name: str) -> Pixels:
    """Return the pixels (size, size, 3) of an image file's content, resized and cropped as `resize_and_crop` does.

    The image is turned as its Exif says, and lies over white where it is transparent.

    Args:
        content: of the file.
        size: side.
        name: of the file, for messages.

    Raises:
        ValueError: see `opened`.
    """
    with opened(content, name) as image:
        image.load()
        turned = orientation(image)
        rgb = to_rgb(image)
        if turned != 1:
            rgb = rgb.transpose(load_pillow().Transpose[_TURNS[turned]])
        return np.asarray(resize_and_crop(rgb, size))


def images_of(stored: Tensor, seed: int, sample: Tensor, flip: bool) -> Tensor:
    """Return pixels, uint8 (B, C, H, W), as floats in [-1, 1]; with ``flip`` about half of them flipped.

    Which ones is a function of the seed and of ``sample``, the global index of each, int64 (B,).
    """
    images = stored.float() / 127.5 - 1
    if not flip:
        return images
    flipped = random_uniform(seed, sample, 1, _FLIP_STREAM)[:, 0] < 0.5
    return torch.where(flipped[:, None, None, None], images.flip(3), images)


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
