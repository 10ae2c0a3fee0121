"""Sets of images that are compared: a dataset's, or statistics in a file of ADM's evaluator."""

import csv
import dataclasses
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmask.data.dataset import Dataset, open_data
from fastmask.data.fingerprint import fingerprint_of
from fastmask.data.images.pixels import opened
from fastmask.data.in_memory import Digits
from fastmask.data.sources.open import open_source
from fastmask.data.store.manifest import MANIFEST, read_manifest, sha256_of
from fastmask.data.store.remote import is_url
from fastmask.evaluation.metrics import Gaussian

_DIGITS_SIDE = 8
_READ = 1024  # images at a time
_HELD_OUT, _MOST_HELD_OUT, _MOST_TRAINING = 5, 10_000, 60_000


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Some images of a dataset.

    Attributes:
        name: name for messages and the protocol.
        dataset: the dataset, which must not flip.
        ids: ids of the images, int64 (N,).
        grey: take the first channel of grey images that are stored with three.
    """

    name: str
    dataset: Dataset
    ids: NDArray[np.int64]
    grey: bool = False

    @classmethod
    def whole(cls, name: str, dataset: Dataset) -> "ImageSet":
        """Return all images of a dataset."""
        return cls(name, dataset, np.arange(len(dataset)))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image or latent."""
        channels, height, width = self.dataset.shape
        return (1 if self.grey else channels), height, width

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return self.dataset.num_classes

    def fingerprint(self) -> str:
        """Return a hash of the images, their selection and order."""
        return fingerprint_of([self.dataset.fingerprint(), self.shape, self.ids.tobytes().hex()])

    def split(self) -> tuple["ImageSet", "ImageSet"]:
        """Return training and held-out images.

        The digits have a split of their own, whose held-out scans no run is trained on. Elsewhere a fifth is held out,
        at most 10,000, by a fixed permutation, from images that the run has seen.
        """
        if isinstance(self.dataset, Digits):
            scans = Digits(self.shape[1], self.num_classes, flip=False, held_out=True)
            return self, ImageSet.whole(f"{self.name} (held out)", scans)
        order = np.random.default_rng(0).permutation(self.ids)
        count = min(len(order) // _HELD_OUT, _MOST_HELD_OUT)
        return (
            dataclasses.replace(self, ids=order[count : count + _MOST_TRAINING]),
            ImageSet(f"{self.name} (a part)", self.dataset, order[:count]),
        )

    def first(self, count: int) -> "ImageSet":
        """Return the first images."""
        return dataclasses.replace(self, ids=self.ids[:count])

    def some(self, count: int) -> "ImageSet":
        """Return at most ``count`` images, by a fixed permutation, in the order of their ids."""
        chosen = np.random.default_rng(0).permutation(self.ids)[:count]
        return self if len(self) <= count else dataclasses.replace(self, ids=np.sort(chosen))

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images, float32 (B, C, H, W), in [-1, 1] unless they are latents, and labels, int64 (B,)."""
        for start in range(0, len(self), size):
            ids = self.ids[start : start + size]
            stored, labels = self.dataset.read(ids)
            images = self.dataset.to_images(stored, 0, torch.from_numpy(ids)).float()
            yield images[:, :1] if self.grey else images, labels

    def labels(self) -> Tensor | None:
        """Return the class of each image, int64 (N,): of `labels.csv` in a folder that `fastmask.sample` drew, or else
        the dataset's; None without classes.
        """
        table = Path(self.name) / "labels.csv"
        if table.is_file():
            return _drawn_labels(table, len(self))
        if not self.num_classes:
            return None
        return torch.cat([labels for _, labels in self.batches(_READ)])

    def like(self, channels: int, what: str) -> "ImageSet":
        """Return these images with one channel, if others have one and these are grey, with three equal channels.

        Args:
            channels: number of channels of the others.
            what: name of the others, for messages.

        Raises:
            ValueError: the images have colours, and the others have none.
        """
        if (self.shape[0], channels) != (3, 1):
            return self
        for images, _ in self.batches(_READ):
            if not (torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])):
                raise ValueError(f"{self.name} holds images in colour, and those of {what} are grey")
        return dataclasses.replace(self, grey=True)


def _drawn_labels(table: Path, count: int) -> Tensor:
    try:
        with table.open(newline="") as file:
            labels = [int(row["class id"]) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{table} is no table of classes, as fastmask.sample writes it: {error}") from error
    if len(labels) != count:
        raise ValueError(f"{table} has {len(labels)} rows, and {count} images lie beside it")
    return torch.tensor(labels)


def open_images(
    data: str,
    image_size: int = 0,
    num_classes: int | None = None,
    vae: str = "",
    device: torch.device | None = None,
) -> ImageSet:
    """Open a dataset, a folder or file of images for comparison: without flips.

    Args:
        data: as `fastmask.data.open_data` takes it.
        image_size: side to which images are resized and cropped, as in ADM; 0 keeps that of the first.
        num_classes: number of classes; None takes it from the data.
        vae: a VAE that encodes the images to latents; empty for the stored form.
        device: device of the VAE.

    Raises:
        ValueError: there are no such images, or they cannot be read.
    """
    if not is_there(data):
        raise ValueError(f"{data} does not exist: images are a dataset, a folder, or an .npz")
    if {"images.npy", "arr_0.npy", "moments.npy"}.isdisjoint(names := _members(Path(data))) and names:
        held = "statistics of Inception's features" if holds_statistics(Path(data)) else "no `arr_0` or `images`"
        raise ValueError(f"{data} holds {held}, where images are needed")
    dataset = open_data(
        data,
        image_size=image_size or _own_side(data),
        num_classes=num_classes,
        flip=False,
        vae=vae,
        device=device or torch.device("cpu"),
        keep_side=not image_size,
    )
    return ImageSet.whole(data, dataset)


def _own_side(data: str) -> int:
    """Return the side of a dataset's images: of a store, of the digits, or the short side of a folder's first image."""
    path = Path(data)
    if (path / MANIFEST).exists():
        return read_manifest(path).image_size
    if not path.is_dir():
        return _DIGITS_SIDE if data == "digits" else 1  # arrays keep their own
    source = open_source(path, labelled=False)
    content = source.content(0)
    if source.side or not isinstance(content, bytes):
        return source.side or 1
    with opened(content, source.name(0)) as image:
        return int(min(image.size))


class Statistics:
    """Mean and covariance of Inception's features in a file of ADM's evaluator or of pytorch-fid.

    Arrays `mu` (2048,) and `sigma` (2048, 2048), and for sFID `mu_s` and `sigma_s`.

    Args:
        path: the `.npz` file.

    Raises:
        ValueError: the file is damaged, or an array has another shape.
    """

    def __init__(self, path: Path) -> None:
        self.name, self._sha256 = str(path), sha256_of(path)
        try:
            with np.load(path, allow_pickle=False) as file:
                self.frechet = _gaussian(file, "mu", "sigma")
                self.spatial = _gaussian(file, "mu_s", "sigma_s") if "mu_s" in file else None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} holds no statistics `mu` and `sigma` of features: {error}") from error

    def fingerprint(self) -> str:
        """Return a hash of the file."""
        return self._sha256


def holds_statistics(path: Path) -> bool:
    """Return whether a path is an `.npz` with `mu` and `sigma`."""
    return {"mu.npy", "sigma.npy"} <= _members(path)


def is_there(data: str) -> bool:
    """Return whether a dataset exists: a built-in one, a file or a folder; a URL is taken to."""
    return data in ("digits", "synthetic") or is_url(data) or Path(data).exists()


def _members(path: Path) -> set[str]:
    """Return the names of the files in an `.npz`; none for another or a damaged file."""
    if path.suffix != ".npz" or not path.is_file() or not zipfile.is_zipfile(path):
        return set()
    try:
        with zipfile.ZipFile(path) as file:
            return set(file.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return set()


def _gaussian(file: "np.lib.npyio.NpzFile", mean_name: str, cov_name: str) -> Gaussian:
    mean, cov = (np.asarray(file[name], np.float64) for name in (mean_name, cov_name))
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise ValueError(f"`{mean_name}` has shape {mean.shape} and `{cov_name}` {cov.shape}")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"`{mean_name}` or `{cov_name}` is not finite")
    return Gaussian(torch.from_numpy(mean), torch.from_numpy(cov))
