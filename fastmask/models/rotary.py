"""Rotary position embedding (RoPE) of queries and keys along the two axes of an image.

RoPE (RoFormer, arXiv 2104.09864, section 3.2) rotates pairs of channels by an angle in proportion to the position, so
that the logit of a query and a key depends on the difference of their positions. In an image half of the pairs are
rotated by the row and half by the column (axial, as in EVA-02, arXiv 2303.11331). With n = head width / 4 and the
frequencies f_i = 10000^(-i / n):

    angles   = [row f_0, .., row f_(n - 1), column f_0, .., column f_(n - 1)]            of 2 n pairs
    pair j   = channels j and j + 2 n of the head                                        (halves, not neighbours)
    rotated  = [x_j cos - x_(j + 2 n) sin,  x_j sin + x_(j + 2 n) cos]
"""

import torch
from torch import Tensor


def rotary_table(rows: int, columns: int, head_width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the cosines and sines of the angles of a grid's positions, computed on the device in float64.

    Returns:
        Shape (rows * columns, 2, head_width / 2), positions in row-major order; cosines first.
    """
    quarter = head_width // 4
    frequency = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device=device) / quarter)
    down, right = (torch.arange(side, device=device)[:, None] * frequency for side in (rows, columns))
    grid = down[:, None].expand(rows, columns, quarter), right.expand(rows, columns, quarter)
    angle = torch.cat(grid, dim=2).flatten(0, 1)
    return torch.stack([angle.cos(), angle.sin()], dim=1).to(dtype)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Return queries or keys rotated by the angles of their positions, computed in the dtype of the rotation.

    Args:
        x: shape (..., K, heads, head width).
        rotation: rows of a `rotary_table`, shape (..., K, 2, head width / 2).

    Returns:
        The shape and the dtype of ``x``.
    """
    cos, sin = (part.unsqueeze(-2) for part in rotation.unbind(-2))
    first, second = x.to(rotation.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)
