"""A picture of the denoising of a few samples."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastmask.diffusion import Sampling
from fastmask.generation.model import Model
from fastmask.grid import save_pixels, to_uint8

ROWS, _COLUMNS = 4, 8


def draw_strip(
    path: Path, model: Model, ids: Sequence[int], count: int, sampling: Sampling, *, seed: int, guide: Model | None
) -> None:
    """Write a PNG whose rows are the first samples, and whose columns what the network expects behind their noise.

    The columns are evenly spaced evaluations, from pure noise to the last, which is the sample itself.

    Args:
        path: the file.
        model: the network.
        ids: classes, used cyclically.
        count: number of rows.
        sampling: as in `Model.draw`.
        seed: as in `Model.draw`.
        guide: as in `Model.draw`.
    """
    seen: list[Tensor] = []
    model.draw(ids, 0, count, sampling, seed=seed, guide=guide, callback=lambda t, x, denoised: seen.append(denoised))
    columns = min(_COLUMNS, len(seen))
    chosen = [seen[i] for i in torch.linspace(0, len(seen) - 1, columns).round().int().tolist()]
    pixels = torch.stack([to_uint8(model.decoder(denoised.float())) for denoised in chosen], 1)
    save_pixels(path, pixels.flatten(0, 1), columns)
