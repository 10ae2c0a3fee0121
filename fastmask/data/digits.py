"""The embedded data set: 1,797 real 8x8 scans of digits, which ship with scikit-learn."""

import importlib
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmask.data.fingerprint import of_arrays

_HELD_OUT = 0.2


class DigitsSplit(NamedTuple):
    """The scans, in [-1, 1], float32, shape (N, 1, 8, 8), and their labels, int64, shape (N,)."""

    train_images: Tensor
    train_labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def load_digits() -> DigitsSplit:
    """Return the scans, a fifth of them held out; the split is always the same."""
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
    """The scans that are not held out, as a `DataSet`."""

    def __init__(self, image_size: int, num_classes: int | None, mirror: bool) -> None:
        if image_size != 8:
            raise ValueError(f"the digits are 8x8 scans: image_size must be 8, not {image_size}")
        if num_classes not in (None, 0, 10):
            raise ValueError(f"the digits have 10 classes: num_classes must be 10, or 0 for none, not {num_classes}")
        if mirror:
            raise ValueError("a mirrored digit is no digit: leave mirror out")
        self._images, self._labels, _, _ = load_digits()
        self.shape = (1, 8, 8)
        self.num_classes = 10 if num_classes is None else num_classes
        self.class_names = [str(digit) for digit in range(self.num_classes)]
        if not self.num_classes:
            self._labels = torch.zeros_like(self._labels)

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return the scans (B, 1, 8, 8) and labels (B,) of these ids."""
        return self._images[ids], self._labels[ids]

    def fingerprint(self) -> str:
        """Return what tells these scans from others."""
        return of_arrays(self._images.numpy(), self._labels.numpy())

    def to_images(self, stored: Tensor, seed: int, sample: Tensor) -> Tensor:
        """Return the scans as they are: nothing is left to chance."""
        return stored
