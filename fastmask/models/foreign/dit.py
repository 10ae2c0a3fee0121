"""Weights of DiT (arXiv 2212.09748), rearranged to compute the same in a `MaskDiT` without a decoder."""

from collections.abc import Mapping

import torch
from torch import Tensor

_TABLE, _TIME_BIAS = "y_embedder.embedding_table.weight", "t_embedder.mlp.2.bias"
_HEAD = ("final_layer.linear.weight", "final_layer.linear.bias")


def signs_of_dit(weights: Mapping[str, Tensor]) -> list[str]:
    """Return what distinguishes DiT's weights from those of a MaskDiT without a decoder; empty for the latter.

    Args:
        weights: weights by name, without prefixes of wrappers.
    """
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    values = patch * patch * channels
    table, head = weights.get(_TABLE), weights.get(_HEAD[0])
    signs: list[str] = []
    if head is not None and head.shape[:1] == (2 * values,):
        signs.append(f"its head gives {2 * values} numbers for the {values} of a patch")
    if table is not None and table.ndim == 2 and table.shape[0] != width == table.shape[1]:
        signs.append(f"its label table has {table.shape[0]} rows, one of them for no label")
    return signs


def from_dit(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights of a `MaskDiT` without a decoder that computes the same, and notes on what was left out.

    The output is the noise, as a DiT's, without the learned variance.

    Args:
        weights: weights by DiT's names, without prefixes of wrappers.

    Returns:
        New weights by name; those that change are fp32, computed in float64.

    Raises:
        ValueError: tensors that no DiT has, or that are missing.
    """
    needed = ("x_embedder.proj.weight", "pos_embed", _TIME_BIAS, *_HEAD)
    missing = [name for name in needed if name not in weights]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    other = next((name for name in weights if name.startswith(("decoder", "mask_token")) or "_norm" in name), None)
    if other:
        raise ValueError(f"it has {other}, which a DiT does not have")
    found, notes = dict(weights), []
    if found["x_embedder.proj.weight"].ndim != 4:
        raise ValueError(f"x_embedder.proj.weight has shape {tuple(found['x_embedder.proj.weight'].shape)}")
    width, channels, patch, _ = found["x_embedder.proj.weight"].shape
    table, rows = found.get(_TABLE), found[_HEAD[1]].numel()
    if found[_TIME_BIAS].shape != (width,) or found[_HEAD[0]].shape != (rows, width):
        raise ValueError(f"{_TIME_BIAS} or {_HEAD[0]} has another shape than those of a width of {width}")
    if table is not None:
        if table.ndim != 2 or table.shape[1] != width or len(table) < 2:
            raise ValueError(f"its label table has shape {tuple(table.shape)} instead of (classes + 1, {width})")
        found[_TABLE], found[_TIME_BIAS] = without_null_row(table, found[_TIME_BIAS])
    if rows == 2 * patch * patch * channels:
        notes.append(
            f"the {channels} channels of learned variance in its head are dropped: no sampler here uses a variance"
        )
        for name in _HEAD:
            per_pixel = found[name].reshape(patch * patch, 2 * channels, -1)[:, :channels]
            found[name] = per_pixel.reshape(-1, *found[name].shape[1:])
    return found, notes


def without_null_row(table: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Turn a label table with a row for no label into one where no label is the zero vector.

    The condition is the time embedding plus a row. So the row for no label is subtracted from those of the classes, and
    added to the time embedding: to the bias of its last Linear.

    Args:
        table: shape (classes + 1, D); the last row is for no label.
        bias: shape (D,).

    Returns:
        The table, fp32, shape (D, classes), and the bias, fp32.
    """
    rows, null = table[:-1].double(), table[-1].double()
    return (rows - null).t().contiguous().float(), (bias.double() + null).float()


def reversed_time(weight: Tensor, frequency: Tensor) -> Tensor:
    """Return the first Linear of a time embedding for the time 1 - t in place of t.

    cos((1 - t) f) = cos f cos(t f) + sin f sin(t f), and sin((1 - t) f) = sin f cos(t f) - cos f sin(t f): the features
    of 1 - t are a rotation of those of t.

    Args:
        weight: shape (D, 2 F): columns of the cosines, then of the sines.
        frequency: f, float64, shape (F,).

    Returns:
        fp32, the shape of ``weight``.
    """
    cosine, sine = weight.double().chunk(2, dim=1)
    across, along = frequency.sin(), frequency.cos()
    return torch.cat([cosine * along + sine * across, cosine * across - sine * along], dim=1).float()
