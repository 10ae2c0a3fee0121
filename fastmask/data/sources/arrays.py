"""Image sources in memory: IDX files (MNIST's format) and `.npz`."""

import gzip
import io
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmask.data.fingerprint import of_arrays
from fastmask.data.sources.labels import check_label
from fastmask.data.sources.npz import images_refused, read_npz
from fastmask.data.sources.source import Source
from fastmask.files import open_regular

_MOST_DIMENSIONS = 4
_DEFLATED = 1032  # maximum compression ratio of deflate


class Array(Source):
    """The images of a file in memory, uint8 (N, H, W, C)."""

    def __init__(
        self, kind: str, path: Path, images: NDArray[np.uint8], labels: NDArray[Any] | None, labelled: bool = True
    ) -> None:
        super().__init__(labelled)
        self.kind, self._path, self._images = kind, path, images
        self.channels, self.side = images.shape[3], min(images.shape[1:3])
        if labels is not None and labelled:
            check_label(int(labels.max()), str(path))
            self.labels, self.labelled_by = labels.astype(np.int32), "labels"
            self.class_names = [str(label) for label in range(int(labels.max()) + 1)]

    def __len__(self) -> int:
        return len(self._images)

    def name(self, item: int) -> str:
        """Return the file and the index of an image in it."""
        return f"{self._path}, image {item}"

    def content(self, item: int) -> NDArray[np.uint8]:
        """Return the pixels of an image."""
        pixels: NDArray[np.uint8] = self._images[item]
        return pixels

    def fingerprint(self) -> str:
        """Return a hash of the images and labels."""
        return of_arrays(self._images, np.array(self.known_labels(), np.int64))


def open_npz(path: Path, labelled: bool = True) -> Array:
    """Open the images of an `.npz`."""
    arrays = read_npz(path, None if labelled else 0)
    if "moments" in arrays:
        raise ValueError(f"{path} holds moments of latents, which are trained on as they are: --data {path}")
    images = arrays["images"]
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        raise ValueError(images_refused(path, arrays["images"]))
    return Array("npz", path, images, arrays.get("labels"), labelled)


def open_idx(path: Path, labelled: bool = True) -> Array:
    """Open the images of an IDX file, with the labels in the file beside it."""
    images = _read_idx(path)
    if images.ndim not in (3, 4) or not images.size or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise ValueError(f"{path} holds no images: its shape is {images.shape}")
    beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1"))
    packed = beside.with_name(f"{beside.name}.gz") if beside.suffix != ".gz" else beside.with_suffix("")
    found = [file for file in (beside, packed) if file != path and file.exists()]
    labels = _read_idx(found[0]) if found and labelled else None
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"{found[0]} has {labels.shape} labels, {path} has {len(images)} images")
    source = Array("idx", path, images if images.ndim == 4 else images[..., None], labels, labelled)
    if labelled and labels is None:
        source.notes.append(f"there are no labels: {beside} is not there")
    return source


def _read_idx(path: Path) -> NDArray[np.uint8]:
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            size, packed = os.fstat(file.fileno()).st_size, file.peek(2)[:2] == b"\x1f\x8b"
            return _values(path, gzip.GzipFile(fileobj=file) if packed else file, size * (_DEFLATED if packed else 1))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _values(path: Path, file: io.BufferedIOBase, most: int) -> NDArray[np.uint8]:
    """Return the values of an IDX file of at most ``most`` bytes."""
    start = file.read(4)
    if len(start) < 4 or start[:3] != b"\0\0\x08" or start[3] > _MOST_DIMENSIONS:
        raise ValueError(f"{path} is not an IDX file of bytes")
    shape = tuple(np.frombuffer(file.read(4 * start[3]), ">u4").tolist())
    count = math.prod(shape)
    if count > most:
        raise ValueError(f"{path} is cut off, or not an IDX file: it is too short for values of shape {shape}")
    check_memory(count, str(path))
    values = file.read(count + 1)
    if len(shape) != start[3] or len(values) != count:
        more = "more than " * (len(values) > count)
        raise ValueError(
            f"{path} is cut off, or not an IDX file: {more}{min(len(values), count):,} values of shape {shape}"
        )
    return np.frombuffer(values, np.uint8).reshape(shape)


def check_memory(count: int, name: str) -> None:
    """Raise a ValueError if a file's values need more than half of the machine's memory."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if count > there / 2:
        raise ValueError(
            f"{name} takes {count / 2**30:.1f} GiB in memory, more than half of this machine's {there / 2**30:.1f}: "
            f"give its images as files, in a folder or in tars"
        )
