"""Pictures: conversion to 8 bits, and grids as PNG."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastmask.files import atomic_write

if TYPE_CHECKING:
    from PIL.Image import Image

_SMALLEST_SIDE = 32  # of an image in a grid; smaller ones are enlarged by a whole factor


def to_uint8(images: Tensor) -> Tensor:
    """Convert images (N, C, H, W) in [-1, 1] to uint8 (N, H, W, C) on the CPU, each value to the nearest level."""
    levels = ((images.float() + 1) * 127.5).round().clamp(0, 255).byte()
    return levels.permute(0, 2, 3, 1).contiguous().cpu()


def to_rgb(pixels: Tensor) -> Tensor:
    """Return uint8 images (N, H, W, 3): grey ones, (N, H, W, 1), three times."""
    return pixels.expand(-1, -1, -1, 3)


def to_pil(images: Tensor) -> "list[Image]":
    """Return uint8 images (N, H, W, C), C 1 or 3, as `PIL.Image.Image` objects."""
    if not importlib.util.find_spec("PIL"):
        raise ValueError("drawing images needs pillow: pip install pillow")
    from PIL import Image  # noqa: PLC0415  (optional)

    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"images must be uint8 (N, H, W, 1 or 3), not {images.dtype} of shape {tuple(images.shape)}")
    return [Image.fromarray(image.numpy()) for image in (images[..., 0] if images.shape[3] == 1 else images)]


def save_grid(path: Path, images: Tensor, columns: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Write images as a grid to one PNG, in row-major order, and return its pixels.

    Args:
        path: the file.
        images: shape (N, C, H, W) in [-1, 1]; one channel is grey and three are RGB; of other numbers (latents) the
            first three channels are shown at a third of their contrast.
        columns: images per row.

    Returns:
        uint8, shape (rows * H, columns * W, 3), upscaled for small images.
    """
    return save_pixels(path, to_uint8(preview(images)), columns)


def preview(latents: Tensor) -> Tensor:
    """Return latents (N, C, h, w) as images: the first three channels at a third of their contrast.

    One or three channels are returned as they are.
    """
    if latents.shape[1] in (1, 3):
        return latents
    if latents.shape[1] == 2:
        latents = torch.cat([latents, torch.zeros_like(latents[:, :1])], 1)
    return latents[:, :3] / 3


def save_pixels(path: Path, pixels: Tensor, columns: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Write uint8 images (N, H, W, C), C 1 or 3, as a grid; otherwise as `save_grid`."""
    if not importlib.util.find_spec("PIL"):
        raise ValueError("drawing images needs pillow: pip install pillow (--sample-every 0 trains without)")
    from PIL import Image  # noqa: PLC0415  (optional)

    count, height, width, _ = pixels.shape
    rows = -(-count // columns)
    canvas = torch.zeros(rows * columns, height, width, 3, dtype=torch.uint8)
    canvas[:count] = to_rgb(pixels)
    grid = (
        canvas.view(rows, columns, height, width, 3).permute(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
    )
    zoom = -(-_SMALLEST_SIDE // height)
    array = grid.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1).numpy()
    with atomic_write(path) as partial:
        Image.fromarray(array).save(partial, format="PNG")
    return array
