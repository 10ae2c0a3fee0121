"""Dropping tokens and putting them back.

gather:   out[b, k] = x[b, ids_keep[b, k]]
restore:  out[b, l] = position[l] + (x[b, ids_restore[b, l]] where ids_restore[b, l] < K, else mask_token)
"""

import torch
from torch import Tensor


def gather_tokens(x: Tensor, ids_keep: Tensor) -> Tensor:
    """Return the kept tokens.

    Equivalent PyTorch: ``torch.gather(x, 1, ids_keep[..., None].expand(-1, -1, D))``.

    Args:
        x: shape (B, L, D).
        ids_keep: integer, shape (B, K), positions in [0, L).

    Returns:
        Shape (B, K, D), dtype of ``x``, bit-equal copies.
    """
    if ids_keep.ndim != 2 or ids_keep.shape[0] != x.shape[0]:
        raise ValueError(f"ids_keep must have shape ({x.shape[0]}, K), not {tuple(ids_keep.shape)}")
    return torch.gather(x, 1, ids_keep.long()[..., None].expand(-1, -1, x.shape[-1]))


def restore_tokens(x: Tensor, mask_token: Tensor, position: Tensor, ids_restore: Tensor) -> Tensor:
    """Return all positions: kept tokens in place, the mask token where one was dropped, plus the position table.

    Args:
        x: kept tokens, shape (B, K, E).
        mask_token: shape (E,).
        position: shape (L, E).
        ids_restore: integer, shape (B, L); where a value is below K the position is kept, and the value says which row
            of ``x`` it is.

    Returns:
        Shape (B, L, E), in the dtype that ``x`` and ``position`` promote to.

    Raises:
        ValueError: a shape that does not fit ``x``.
    """
    batch, keep, width = x.shape
    length = position.shape[0]
    if ids_restore.shape != (batch, length):
        raise ValueError(f"ids_restore must have shape {(batch, length)}, not {tuple(ids_restore.shape)}")
    if mask_token.shape != (width,) or position.shape != (length, width):
        raise ValueError(
            f"mask_token and position must have shapes ({width},) and (L, {width}) for x of shape {tuple(x.shape)}, "
            f"not {tuple(mask_token.shape)} and {tuple(position.shape)}"
        )
    placed = gather_tokens(x, ids_restore.clamp(max=keep - 1))
    return torch.where((ids_restore < keep)[..., None], placed, mask_token.to(x.dtype)) + position
