"""Image grids as PNG."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmask.files import atomic_write


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
    if not importlib.util.find_spec("PIL"):
        raise ValueError("drawing images needs pillow: pip install pillow (--sample-every 0 trains without)")
    from PIL import Image  # noqa: PLC0415  (optional)

    count, channels, height, width = images.shape
    if channels == 2:
        images = torch.cat([images, torch.zeros_like(images[:, :1])], 1)
    shown = images.expand(-1, 3, -1, -1) if channels in (1, 3) else images[:, :3] / 3
    pixels = ((shown.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    rows = -(-count // columns)
    canvas = torch.zeros(rows * columns, 3, height, width, dtype=torch.uint8)
    canvas[:count] = pixels
    grid = (
        canvas.view(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    )
    zoom = max(1, 32 // height)
    array = grid.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1).numpy()
    with atomic_write(path) as partial:
        Image.fromarray(array).save(partial, format="PNG")
    return array
