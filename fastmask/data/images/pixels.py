"""Decoding, resizing and cropping of images with Pillow."""

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


MAX_ASPECT = 20  # long side over short side


_FLIP_STREAM = 5


# The formats of SUFFIXES only: Pillow runs external programs for others, such as EPS. JPEG includes MPO.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


# The errors that Pillow raises for damaged files, in addition to DecompressionBombError.
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


_ORIENTATION = 0x0112  # Exif tag


_TURNS = {  # Exif value to the name in Pillow's Transpose
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
    """Resize and centre-crop a Pillow image to a square of side ``size``, as in ADM (arXiv 2105.05233).

    The short side is halved with a box filter while it is at least twice the size, then resized bicubically.
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
    """Raise a ValueError if the aspect ratio of an image, (width, height), exceeds `MAX_ASPECT`."""
    short, long = sorted(size)
    if long > MAX_ASPECT * short:
        # Enlarging the short side would also enlarge the long one, to gigabytes, only to crop nearly all of it.
        raise ValueError(f"it has {size[0]} x {size[1]} pixels: one side is more than {MAX_ASPECT} times the other")


def to_rgb(image: Any) -> Any:
    """Convert a Pillow image to 8-bit RGB, with transparent pixels composited over white.

    Pillow's own conversion would clip 16-bit pixels at 255, and show the colour stored under transparent ones.
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
    """Open an image file's content as a Pillow image, without decoding its pixels.

    Args:
        content: the file's content; its format, one of `SUFFIXES`, is detected from the first bytes.
        name: file name, for messages.

    Raises:
        ValueError: the file is damaged, not an image, too large, too elongated, or has several frames (except MPO, a
            photo with extra views, whose first frame is used). Errors inside the block are converted too.
    """
    pillow = load_pillow()
    try:
        with pillow.open(io.BytesIO(content), formats=_FORMATS) as image:
            check_aspect(image.size)
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # in an MPO the further frames are views or a preview
                raise ValueError(f"it has {frames} frames: keep one of them as an image of its own")
            yield image
    except (*_DAMAGED, pillow.DecompressionBombError) as error:
        unknown = isinstance(error, pillow.UnidentifiedImageError)
        reason = "it is empty, damaged or of another format" if unknown else error or type(error).__name__
        raise ValueError(f"{name} cannot be read as an image: {reason}") from error


def orientation(image: Any) -> int:
    """Return the Exif orientation of a Pillow image, 1 if it is upright or has none.

    Call `load` first for formats that store it after the pixels, or that Pillow rotates while decoding.
    """
    try:
        turned = image.getexif().get(_ORIENTATION, 1)
    except _DAMAGED:
        return 1
    return turned if turned in _TURNS else 1


def decode(content: bytes, size: int, name: str) -> Pixels:
    """Decode an image file to pixels (size, size, 3), resized and cropped as in `resize_and_crop`.

    The Exif orientation is applied, and transparent pixels are composited over white.

    Args:
        content: the file's content.
        size: side of the output in pixels.
        name: file name, for messages.

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
    """Convert pixels, uint8 (B, C, H, W), to float32 in [-1, 1]; with ``flip``, random horizontal flips (p = 0.5).

    The flips are a function of the seed and of ``sample``, the global sample index, int64 (B,).
    """
    images = stored.float() / 127.5 - 1
    if not flip:
        return images
    return torch.where(is_flipped(seed, sample)[:, None, None, None], images.flip(3), images)


def is_flipped(seed: int, sample: Tensor) -> Tensor:
    """Return which samples `images_of` flips, bool (B,); arguments as there."""
    return random_uniform(seed, sample, 1, _FLIP_STREAM)[:, 0] < 0.5


def resize_all(images: Pixels, size: int) -> Pixels:
    """Resize and crop images (N, H, W, C) with C = 1 or 3, as in `resize_and_crop`."""
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
