"""Latents of an autoencoder: sampling from moments, scaling, and checks."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmask.data.store.manifest import MAX_CLASSES
from fastmask.kernels import random_normal

Record = tuple[NDArray[Any], int]  # (copies, channels, height, width), and the label


MAX_RECORD_BYTES = 1 << 28  # limit for one latent; a 1024-pixel image in 16 channels takes 1 MB


_SAMPLED = 64  # records for statistics


DOWNSAMPLING = 8


SCALE = 0.18215  # brings Stable Diffusion's latents to a standard deviation of about 1


_POSTERIOR_STREAM = 4


def latents_of(stored: Tensor, seed: int, sample: Tensor) -> Tensor:
    """Sample latents (B, C, h, w) from moments (B, 2C, h, w), in float32, unscaled.

    The noise is a function of the seed and of ``sample``, the global sample index, int64 (B,).
    """
    mean, log_variance = stored.float().chunk(2, dim=1)
    noise = random_normal(seed, sample, mean[0].numel(), _POSTERIOR_STREAM).view(mean.shape)
    return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise


@dataclasses.dataclass(frozen=True)
class ScaledBy:
    """Scale and shift of latents for training, (latent - shift) * scale, and their origin.

    Attributes:
        scale: one number for all channels, or one for each.
        shift: see scale.
        source: origin of scale and shift, for messages.
    """

    scale: float | list[float]
    shift: float | list[float]
    source: str

    def __str__(self) -> str:
        return f"scale {shown(self.scale)}, shift {shown(self.shift)} ({self.source})"


def shown(values: float | list[float]) -> str:
    """Format a number, or one per channel, for a message."""
    return " ".join(f"{value:.5g}" for value in (values if isinstance(values, list) else [values]))


def sample_records(read: Callable[[int], Record], count: int, what: str) -> list[Record]:
    """Return up to 64 evenly spaced records, without those that are damaged or not finite.

    Args:
        read: returns a record; an OSError or ValueError if it is damaged.
        count: number of records.
        what: origin of the records, for messages.

    Raises:
        ValueError: all sampled records are damaged; the message describes the first.
    """
    parts = [_try(read, item, what) for item in np.unique(np.linspace(0, count - 1, _SAMPLED).astype(int)).tolist()]
    found = [part for part in parts if isinstance(part, tuple)]
    if not found:
        raise ValueError(str(parts[0]))
    return found


def _try(read: Callable[[int], Record], item: int, what: str) -> Record | Exception:
    try:
        record = read(item)
    except (OSError, ValueError) as error:
        return error
    if not np.isfinite(record[0]).all():
        return ValueError(f"{what}: record {item} holds values that are not finite")
    return record


def check_latent(values: NDArray[Any], name: str, *, even: bool = False) -> NDArray[Any]:
    """Return values that are a latent, floats (C, h, w), with ``even`` C for moments; otherwise raise a ValueError."""
    floats = np.issubdtype(values.dtype, np.floating)
    if values.ndim != 3 or not values.size or not floats or (even and len(values) % 2):
        raise ValueError(f"{name} holds no latent, but {values.dtype} of shape {values.shape}")
    return values


def all_finite(values: NDArray[Any]) -> bool:
    """Return whether all values, float16 or float32, are finite; much faster than `numpy.isfinite`.

    It compares bit patterns. As signed integers, positive infinity and NaN are above all finite values; as unsigned
    integers, the negative values are above the positive ones, with negative infinity and NaN at the top.
    """
    if not values.size:
        return True
    infinity, signed, unsigned = (0x7C00, "i2", "u2") if values.itemsize == 2 else (0x7F800000, "i4", "u4")
    negative = infinity + (1 << (8 * values.itemsize - 1))
    return bool(values.view(signed).max() < infinity and values.view(unsigned).max() < negative)


def check_label(label: int, name: str) -> int:
    """Return a label if a store can hold it; a ValueError with ``name`` otherwise."""
    if not 0 <= label < MAX_CLASSES:
        raise ValueError(f"{name} has label {label}, which is outside 0 .. {MAX_CLASSES - 1}")
    return label


class Scaling:
    """Scaling of latents for training: (latent - shift) * scale.

    Args:
        scale: one number for all channels, or one for each.
        shift: see scale.
    """

    def __init__(self, scale: float | list[float], shift: float | list[float]) -> None:
        self._scale, self._shift = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (scale, shift))

    def apply(self, latents: Tensor) -> Tensor:
        """Return scaled latents (B, C, h, w)."""
        self._follow(latents)
        return (latents - self._shift) * self._scale

    def undo(self, latents: Tensor) -> Tensor:
        """Invert `apply`."""
        self._follow(latents)
        return latents / self._scale + self._shift

    def _follow(self, latents: Tensor) -> None:
        self._scale, self._shift = self._scale.to(latents.device), self._shift.to(latents.device)


def number_or_list(values: list[float]) -> float | list[float]:
    """Return a single number as a float, several as a list."""
    return values[0] if len(values) == 1 else values
