"""Weights of SiT (arXiv 2401.08740), rearranged to predict the velocity of `RectifiedFlow` at its time."""

from collections.abc import Mapping

from torch import Tensor

from fastmask.models.foreign.dit import from_dit, reversed_time
from fastmask.models.layers import time_frequencies


def from_sit(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights of a `MaskDiT` without a decoder that predicts the same, and notes on what was left out.

    A SiT's time s runs from noise to image, x = s image + (1 - s) noise, and it predicts image - noise. Here t = 1 - s
    and the network predicts noise - image: the head is negated, and the time embedding's first Linear is rotated.

    Args:
        weights: weights by the names of SiT, which are DiT's, without prefixes of wrappers.

    Returns:
        As `from_dit`.

    Raises:
        ValueError: as `from_dit`.
    """
    found, notes = from_dit(weights)
    first = "t_embedder.mlp.0.weight"
    frequency = time_frequencies().double()
    if first not in found or found[first].shape[1:] != (2 * len(frequency),):
        raise ValueError(f"{first} is missing, or not of {2 * len(frequency)} columns")
    found[first] = reversed_time(found[first], frequency)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        found[name] = -found[name]
    return found, notes
