"""Datasets in memory or generated on the fly: images, moments, digits, random latents."""

import importlib
import zipfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmask.data.fingerprint import fingerprint_of, of_arrays
from fastmask.data.images.pixels import images_of, resize_all
from fastmask.data.latents import DOWNSAMPLING, SCALE, Record, ScaledBy, Scaling, all_finite, latents_of, number_or_list
from fastmask.data.sources.npz import Arrays, images_refused, read_npz
from fastmask.diffusion.origin import LatentSpace
from fastmask.kernels import random_normal, random_uniform


class ImageArray:
    """An `.npz` of images in memory, uint8, shape (N, H, W, C) with C = 1 or 3, or (N, H, W), as a `Dataset`.

    Images are resized and cropped to ``image_size`` when the file is opened; None keeps the short side.
    """

    def __init__(self, path: Path, arrays: Arrays, image_size: int | None, flip: bool) -> None:
        images = arrays["images"]
        if images.ndim == 3:
            images = images[..., None]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
            raise ValueError(images_refused(path, arrays["images"]))
        self._stored = images.shape[1:3]
        image_size = image_size or min(self._stored)
        if self._stored != (image_size, image_size):
            images = resize_all(images, image_size)
        self._images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        self._labels = torch.from_numpy(arrays.get("labels", np.zeros(len(images), np.int64)))
        self._flip = flip
        self.shape = (images.shape[3], image_size, image_size)
        self.num_classes = int(arrays.get("num_classes", 0))
        self.class_names = [str(label) for label in range(self.num_classes)]
        self.latents = None

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return the images, uint8 (B, C, H, W), and labels (B,) of these ids."""
        index = torch.from_numpy(ids)  # index_select copies whole records; advanced indexing copies value by value
        return self._images.index_select(0, index), self._labels.index_select(0, index)

    def describe(self) -> str:
        """Return one line with number, classes and resizing of the images."""
        classes = f"{self.num_classes:,} classes" if self.num_classes else "no classes"
        line, (height, width), side = f"npz, {len(self):,} images, {classes}", self._stored, self.shape[1]
        if (height, width) == (side, side):
            return line
        return f"{line}, resized and cropped from {height} x {width} to {side} x {side}"

    def fingerprint(self) -> str:
        """Return a hash of the images and labels."""
        return of_arrays(self._images.numpy(), self._labels.numpy())

    def to_images(self, stored: Tensor, seed: int, sample: Tensor) -> Tensor:
        """Return the images in [-1, 1], randomly flipped."""
        return images_of(stored, seed, sample, self._flip)


_CHANNELS = 4


_SYNTHETIC_SAMPLES = 1_000_000


class Moments:
    """An `.npz` of moments, float16 or float32, shape (N, 2C, h, w), means before log-variances, as a `Dataset`.

    `scale` and `shift` in the file, each a number or one per channel, scale the latents for training: (latent - shift)
    * scale. Without them, 4 channels are taken as Stable Diffusion's.
    """

    def __init__(self, path: Path, arrays: Arrays, image_size: int, flip: bool) -> None:
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
        if flip:
            raise ValueError(f"{path} holds latents, and a flipped latent is not that of the flipped image")
        self._path, self.scaled_by = path, scaled_by
        self._moments = torch.from_numpy(moments)
        self._labels = torch.from_numpy(arrays.get("labels", np.zeros(len(moments), np.int64)))
        self._scaling = Scaling(self.scaled_by.scale, self.scaled_by.shift)
        self.shape = (moments.shape[1] // 2, side, side)
        self.num_classes = int(arrays.get("num_classes", 0))
        self.class_names = [str(label) for label in range(self.num_classes)]
        self.latents = LatentSpace(scale=scaled_by.scale, shift=scaled_by.shift)
        self._downsampling = downsampling

    def __len__(self) -> int:
        return len(self._labels)

    def describe(self) -> str:
        """Return one line with shape, downsampling, classes and scale of the moments."""
        return (
            f"{len(self):,} moments {tuple(self._moments.shape[1:])} of images downsampled by {self._downsampling}, "
            f"{self.num_classes:,} classes, {self.scaled_by}"
        )

    def read(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return the moments (B, 2C, h, w) and labels (B,) of these ids; a ValueError if they are not finite."""
        index = torch.from_numpy(ids)  # index_select copies whole records; advanced indexing copies value by value
        moments = self._moments.index_select(0, index)
        if not all_finite(moments.numpy()):
            bad = ids[int((~moments.isfinite()).flatten(1).any(1).nonzero()[0])]
            raise ValueError(f"{self._path}: moments {bad} hold values that are not finite")
        return moments, self._labels.index_select(0, index)

    def fingerprint(self) -> str:
        """Return a hash of the moments, labels and scale."""
        moments, scaled_by = self._moments.numpy(), self.scaled_by
        return of_arrays(moments, self._labels.numpy(), scaled_by.scale, scaled_by.shift)

    def to_images(self, stored: Tensor, seed: int, sample: Tensor) -> Tensor:
        """Return latents (B, C, h, w), sampled from the moments at each visit."""
        return self._scaling.apply(latents_of(stored, seed, sample))


class NpzMoments:
    """The same file as `fastmask.data.foreign.open.Latents`, for import into a store."""

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
        """Return the file and the index in it."""
        return f"{self._path}, moments {item}"

    def read(self, item: int) -> Record:
        """Return the moments (1, 2C, h, w) and the label."""
        return self._moments[item][None], int(self._labels[item])


def holds_moments(path: Path) -> bool:
    """Return whether a path is an `.npz` of moments."""
    if path.suffix != ".npz" or not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return "moments.npy" in file.namelist()


def _checked_moments(path: Path, arrays: Arrays) -> tuple[NDArray[Any], ScaledBy | None]:
    """Return the moments of an `.npz`, and their scale and shift, None if unknown."""
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


class Synthetic:
    """Random latents of unit variance and random labels, functions of the sample id alone, as a `Dataset`."""

    def __init__(self, image_size: int, num_classes: int) -> None:
        side = _side(image_size)
        self.shape = (_CHANNELS, side, side)
        self.num_classes = num_classes
        self.class_names = [str(label) for label in range(num_classes)]
        self.latents = LatentSpace()

    def __len__(self) -> int:
        return _SYNTHETIC_SAMPLES

    def read(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return latents (B, 4, h, w) and labels (B,) of these ids."""
        sample = torch.from_numpy(ids)
        side = self.shape[1]
        latents = random_normal(0, sample, _CHANNELS * side * side, 0).view(-1, *self.shape)
        return latents, (random_uniform(0, sample, 1, 1)[:, 0] * self.num_classes).long()

    def fingerprint(self) -> str:
        """Return a hash of shape and number of classes, which determine the latents."""
        return fingerprint_of(["synthetic", self.shape, self.num_classes])

    def to_images(self, stored: Tensor, seed: int, sample: Tensor) -> Tensor:
        """Return the latents unchanged."""
        return stored


def _side(image_size: int) -> int:
    if image_size % DOWNSAMPLING:
        raise ValueError(f"image_size must be a multiple of {DOWNSAMPLING} for latents, not {image_size}")
    return image_size // DOWNSAMPLING


_HELD_OUT = 0.2


class DigitsSplit(NamedTuple):
    """The digits: scans in [-1, 1], float32, shape (N, 1, 8, 8), and labels, int64, shape (N,)."""

    train_images: Tensor
    train_labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def load_digits() -> DigitsSplit:
    """Load the digits, with a fixed fifth held out."""
    try:
        digits: Any = importlib.import_module("sklearn.datasets").load_digits()
    except ModuleNotFoundError as error:
        raise ValueError("the digits need scikit-learn: pip install scikit-learn") from error
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1  # stored as 0 .. 16
    labels = torch.from_numpy(digits.target).long()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    held_out, train = order.tensor_split([round(_HELD_OUT * len(labels))])
    return DigitsSplit(images[train], labels[train], images[held_out], labels[held_out])


class Digits:
    """The training split of the digits, or the held-out scans, as a `Dataset`."""

    def __init__(self, image_size: int, num_classes: int | None, flip: bool, *, held_out: bool = False) -> None:
        if image_size != 8:
            raise ValueError(f"the digits are 8x8 scans: image_size must be 8, not {image_size}")
        if num_classes not in (None, 0, 10):
            raise ValueError(f"the digits have 10 classes: num_classes must be 10, or 0 for none, not {num_classes}")
        if flip:
            raise ValueError("a flipped digit is no digit: leave flip out")
        split = load_digits()
        self._images, self._labels = split[2:] if held_out else split[:2]
        self.shape = (1, 8, 8)
        self.num_classes = 10 if num_classes is None else num_classes
        self.class_names = [str(digit) for digit in range(self.num_classes)]
        self.latents = None
        if not self.num_classes:
            self._labels = torch.zeros_like(self._labels)

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return the scans (B, 1, 8, 8) and labels (B,) of these ids."""
        return self._images[ids], self._labels[ids]

    def fingerprint(self) -> str:
        """Return a hash of the scans and labels."""
        return of_arrays(self._images.numpy(), self._labels.numpy())

    def to_images(self, stored: Tensor, seed: int, sample: Tensor) -> Tensor:
        """Return the scans unchanged; nothing is random."""
        return stored
