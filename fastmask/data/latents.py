"""Latents of an autoencoder: drawn from moments, scaled, of an `.npz`, or random stand-ins."""

import dataclasses
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmask.data.fingerprint import fingerprint_of, of_arrays
from fastmask.data.manifest import MAX_CLASSES
from fastmask.data.npz import Arrays, read_npz
from fastmask.kernels import random_normal, random_uniform

Record = tuple[NDArray[Any], int]  # (copies, channels, height, width), and the label

MAX_RECORD_BYTES = 1 << 28  # of one latent; that of a 1024-pixel image in 16 channels has 1 MB
_SAMPLED = 64  # records that statistics are taken of
_CHANNELS = 4
DOWNSAMPLING = 8
SCALE = 0.18215  # brings Stable Diffusion's latents to a standard deviation of about 1
_POSTERIOR_STREAM = 4
_SYNTHETIC_SAMPLES = 1_000_000


def latents_of(stored: Tensor, seed: int, sample: Tensor) -> Tensor:
    """Return latents (B, C, h, w) drawn from moments (B, 2C, h, w), in float32, not yet scaled.

    The noise is a function of the seed and of ``sample``, the global index of each, int64 (B,).
    """
    mean, log_variance = stored.float().chunk(2, dim=1)
    noise = random_normal(seed, sample, mean[0].numel(), _POSTERIOR_STREAM).view(mean.shape)
    return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise


@dataclasses.dataclass(frozen=True)
class ScaledBy:
    """What latents are trained on with, (latent - shift) * scale, and where that comes from.

    Attributes:
        scale: one number for all channels, or one for each.
        shift: see scale.
        source: where both come from.
    """

    scale: float | list[float]
    shift: float | list[float]
    source: str

    def __str__(self) -> str:
        return f"scale {shown(self.scale)}, shift {shown(self.shift)} ({self.source})"


def shown(values: float | list[float]) -> str:
    """Return a number, or one per channel, for a line."""
    return " ".join(f"{value:.5g}" for value in (values if isinstance(values, list) else [values]))


def sample_records(read: Callable[[int], Record], count: int, what: str) -> list[Record]:
    """Return up to 64 records that are evenly spread over some, without those that are damaged or not finite.

    Args:
        read: returns a record; an OSError or ValueError if it is damaged.
        count: how many there are.
        what: where they are from, for messages.

    Raises:
        ValueError: all are damaged; says how the first is.
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
    """Return values if they are those of a latent, floats (C, h, w), with ``even`` of moments; else a ValueError."""
    floats = np.issubdtype(values.dtype, np.floating)
    if values.ndim != 3 or not values.size or not floats or (even and len(values) % 2):
        raise ValueError(f"{name} holds no latent, but {values.dtype} of shape {values.shape}")
    return values


def all_finite(values: NDArray[Any]) -> bool:
    """Return whether values, float16 or float32, are neither infinite nor NaN; much faster than `numpy.isfinite`.

    Their bits are compared. As signed integers the positive values are in order, with infinity and NaN above all
    others; as unsigned ones the negative values are, above the positive ones.
    """
    if not values.size:
        return True
    infinity, signed, unsigned = (0x7C00, "i2", "u2") if values.itemsize == 2 else (0x7F800000, "i4", "u4")
    negative = infinity + (1 << (8 * values.itemsize - 1))
    return bool(values.view(signed).max() < infinity and values.view(unsigned).max() < negative)


def check_label(label: int, name: str) -> int:
    """Return a label if a store can hold it; else a ValueError that names whose it is."""
    if not 0 <= label < MAX_CLASSES:
        raise ValueError(f"{name} has label {label}, which is outside 0 .. {MAX_CLASSES - 1}")
    return label


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
    """An `.npz` of moments, float16 or float32, shape (N, 2C, h, w), means before log-variances, as a `DataSet`.

    Where the file holds `scale` and `shift`, numbers or one per channel, latents are trained on as
    (latent - shift) * scale; 4 channels without them are Stable Diffusion's.
    """

    def __init__(self, path: Path, arrays: Arrays, image_size: int, mirror: bool) -> None:
        moments, scaled_by = _checked_moments(path, arrays)
        if scaled_by is None:
            raise ValueError(
                f"{path} holds moments of {moments.shape[1] // 2} channels, whose scale is not known: write arrays "
                f"`scale` and `shift` into the file, or make a store of it by python -m fastmask.prepare with "
                f"--latent-scale and --latent-shift"
            )
        side = moments.shape[2]
        downsampling = image_size // side if "scale" in arrays else DOWNSAMPLING
        if side * downsampling != image_size:
            raise ValueError(
                f"{path} holds moments of side {side}, which are not those of image_size {image_size} at a "
                f"downsampling of {downsampling or 'less than 1'}"
            )
        if mirror:
            raise ValueError(f"{path} holds latents, and a mirrored latent is not that of the mirrored image")
        self._path, self.scaled_by = path, scaled_by
        self._moments = torch.from_numpy(moments)
        self._labels = torch.from_numpy(arrays.get("labels", np.zeros(len(moments), np.int64)))
        self._scaling = Scaling(self.scaled_by.scale, self.scaled_by.shift)
        self.shape = (moments.shape[1] // 2, side, side)
        self.num_classes = int(arrays.get("num_classes", 0))
        self.class_names = [str(label) for label in range(self.num_classes)]
        self._downsampling = downsampling

    def __len__(self) -> int:
        return len(self._labels)

    def describe(self) -> str:
        """Return what the file was taken for, in one line."""
        return (
            f"{len(self):,} moments {tuple(self._moments.shape[1:])} of images downsampled by {self._downsampling}, "
            f"{self.num_classes:,} classes, {self.scaled_by}"
        )

    def read(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return the moments (B, 2C, h, w) and labels (B,) of these ids; a ValueError for values not finite."""
        index = torch.from_numpy(ids)  # which copies whole records, where an index in brackets goes value by value
        moments = self._moments.index_select(0, index)
        if not all_finite(moments.numpy()):
            bad = ids[int((~moments.isfinite()).flatten(1).any(1).nonzero()[0])]
            raise ValueError(f"{self._path}: moments {bad} hold values that are not finite")
        return moments, self._labels.index_select(0, index)

    def fingerprint(self) -> str:
        """Return what tells these moments, labels and their scale from others."""
        moments, scaled_by = self._moments.numpy(), self.scaled_by
        return of_arrays(moments, self._labels.numpy(), scaled_by.scale, scaled_by.shift)

    def to_images(self, stored: Tensor, seed: int, sample: Tensor) -> Tensor:
        """Return latents (B, C, h, w) drawn from the moments, anew at each visit."""
        return self._scaling.apply(latents_of(stored, seed, sample))


class NpzMoments:
    """The same file as `fastmask.data.importers.Latents`, of which a store is made."""

    kind = "npz-moments"
    holds: Literal["moments", "latents"] = "moments"
    vae = "not known"

    def __init__(self, path: Path) -> None:
        arrays = read_npz(path, None)
        self._path = path
        self._moments, self.scaled_by = _checked_moments(path, arrays)
        self._labels = arrays.get("labels", np.zeros(len(self._moments), np.int64))
        self.unscaled = f"{path} holds no arrays `scale` and `shift`"
        stable = self.scaled_by is not None and "scale" not in arrays
        self.downsampling = DOWNSAMPLING if stable else None
        self.notes = ["labels of the file" if "labels" in arrays else "no labels"]

    def __len__(self) -> int:
        return len(self._moments)

    def name(self, item: int) -> str:
        """Return the file, and which of its moments they are."""
        return f"{self._path}, moments {item}"

    def read(self, item: int) -> Record:
        """Return the moments (1, 2C, h, w) and the label."""
        return self._moments[item][None], int(self._labels[item])


def holds_moments(path: Path) -> bool:
    """Return whether a path is of an `.npz` of moments."""
    if path.suffix != ".npz" or not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return "moments.npy" in file.namelist()


def _checked_moments(path: Path, arrays: Arrays) -> tuple[NDArray[Any], ScaledBy | None]:
    """Return the moments of an `.npz`, and what they are scaled by, None if that is not known."""
    moments = arrays["moments"]
    if moments.dtype not in (np.float16, np.float32) or moments.ndim != 4 or moments.shape[1] % 2:
        raise ValueError(
            f"{path}: `moments` must be float16 or float32 of shape (N, 2C, h, w), means before log-variances, not "
            f"{moments.dtype} of shape {tuple(moments.shape)}"
        )
    if moments.shape[2] != moments.shape[3] or not moments.size:
        raise ValueError(f"{path}: `moments` of shape {tuple(moments.shape)} are not those of square images")
    channels = moments.shape[1] // 2
    given = {name: arrays[name] for name in ("scale", "shift") if name in arrays}
    if len(given) == 1:
        raise ValueError(f"{path} holds `{min(given)}` alone: `scale` and `shift` go together (0 is no shift)")
    if not given:
        source = "Stable Diffusion's KL-f8, since the file holds no `scale` and `shift`"
        return moments, ScaledBy(SCALE, 0.0, source) if channels == _CHANNELS else None
    for name, values in given.items():
        fits = values.size in (1, channels) and np.issubdtype(values.dtype, np.floating) and np.isfinite(values).all()
        if not fits or (name == "scale" and values.min() <= 0):
            raise ValueError(
                f"{path}: `{name}` must be a finite float{' above 0' * (name == 'scale')}, or one for each of "
                f"{channels} channels, not {values.dtype} of shape {tuple(values.shape)}"
            )
    scale, shift = (number_or_list(given[name].ravel().tolist()) for name in ("scale", "shift"))
    return moments, ScaledBy(scale, shift, "the file's `scale` and `shift`")


def number_or_list(values: list[float]) -> float | list[float]:
    """Return the only one of some numbers, or all of them."""
    return values[0] if len(values) == 1 else values


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

    def fingerprint(self) -> str:
        """Return what tells these latents from others: they are functions of little."""
        return fingerprint_of(["synthetic", self.shape, self.num_classes])

    def to_images(self, stored: Tensor, seed: int, sample: Tensor) -> Tensor:
        """Return the latents as they are."""
        return stored


def _side(image_size: int) -> int:
    if image_size % DOWNSAMPLING:
        raise ValueError(f"image_size must be a multiple of {DOWNSAMPLING} for latents, not {image_size}")
    return image_size // DOWNSAMPLING
