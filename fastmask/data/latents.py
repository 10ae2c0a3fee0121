"""Latents of the Stable Diffusion KL-f8 autoencoder: stored moments, or random stand-ins."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmask.data.npz import Arrays
from fastmask.kernels import random_normal, random_uniform

_CHANNELS = 4
DOWNSAMPLING = 8
SCALE = 0.18215  # brings the latents to a standard deviation of about 1
_POSTERIOR_STREAM = 4
_SYNTHETIC_SAMPLES = 1_000_000


def latents_of(stored: Tensor, seed: int, sample: Tensor) -> Tensor:
    """Return latents (B, C, h, w) drawn from moments (B, 2C, h, w), in float32, not yet scaled.

    The noise is a function of the seed and of ``sample``, the global index of each, int64 (B,).
    """
    mean, log_variance = stored.float().chunk(2, dim=1)
    noise = random_normal(seed, sample, mean[0].numel(), _POSTERIOR_STREAM).view(mean.shape)
    return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise


class Scaling:
    """How latents become what is trained on: (latent - shift) * scale.

    Args:
        scale: one number for all channels, or one for each.
        shift: see scale.
    """

    def __init__(self, scale: float | list[float], shift: float | list[float]) -> None:
        self._scale, self._shift = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (scale, shift))

    def apply(self, latents: Tensor) -> Tensor:
        """Return latents (B, C, h, w) as they are trained on."""
        self._follow(latents)
        return (latents - self._shift) * self._scale

    def undo(self, latents: Tensor) -> Tensor:
        """Return the latents (B, C, h, w) that `apply` made these of."""
        self._follow(latents)
        return latents / self._scale + self._shift

    def _follow(self, latents: Tensor) -> None:
        self._scale, self._shift = self._scale.to(latents.device), self._shift.to(latents.device)


class Moments:
    """An `.npz` of moments, float16 or float32, shape (N, 8, h, w), means before log-variances, as a `DataSet`."""

    def __init__(self, path: Path, arrays: Arrays, image_size: int, mirror: bool) -> None:
        moments, side = arrays["moments"], _side(image_size)
        if moments.dtype not in (np.float16, np.float32) or moments.shape[1:] != (2 * _CHANNELS, side, side):
            raise ValueError(
                f"{path}: `moments` must be float16 or float32 of shape (N, 8, {side}, {side}) for image_size "
                f"{image_size}, not {moments.dtype} of shape {tuple(moments.shape)}"
            )
        if mirror:
            raise ValueError(f"{path} holds latents, and a mirrored latent is not that of the mirrored image")
        self._moments = torch.from_numpy(moments)
        self._labels = torch.from_numpy(arrays.get("labels", np.zeros(len(moments), np.int64)))
        self.shape = (_CHANNELS, side, side)
        self.num_classes = int(arrays.get("num_classes", 0))
        self.class_names = [str(label) for label in range(self.num_classes)]

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return the moments (B, 8, h, w) and labels (B,) of these ids."""
        index = torch.from_numpy(ids)  # which copies whole records, where an index in brackets goes value by value
        return self._moments.index_select(0, index), self._labels.index_select(0, index)

    def to_images(self, stored: Tensor, seed: int, sample: Tensor) -> Tensor:
        """Return latents (B, 4, h, w) drawn from the moments, anew at each visit."""
        return latents_of(stored, seed, sample) * SCALE


class Synthetic:
    """Random latents of unit variance and random labels, functions of the sample's id alone, as a `DataSet`."""

    def __init__(self, image_size: int, num_classes: int) -> None:
        side = _side(image_size)
        self.shape = (_CHANNELS, side, side)
        self.num_classes = num_classes
        self.class_names = [str(label) for label in range(num_classes)]

    def __len__(self) -> int:
        return _SYNTHETIC_SAMPLES

    def read(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return latents (B, 4, h, w) and labels (B,) of these ids."""
        sample = torch.from_numpy(ids)
        side = self.shape[1]
        latents = random_normal(0, sample, _CHANNELS * side * side, 0).view(-1, *self.shape)
        return latents, (random_uniform(0, sample, 1, 1)[:, 0] * self.num_classes).long()

    def to_images(self, stored: Tensor, seed: int, sample: Tensor) -> Tensor:
        """Return the latents as they are."""
        return stored


def _side(image_size: int) -> int:
    if image_size % DOWNSAMPLING:
        raise ValueError(f"image_size must be a multiple of {DOWNSAMPLING} for latents, not {image_size}")
    return image_size // DOWNSAMPLING
