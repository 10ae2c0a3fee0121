"""Decodes a source's images ahead of what stores them."""

import functools
import signal
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from fastmask.data.images import decode, resize_all
from fastmask.data.sources import Source


class Decoded(NamedTuple):
    """Items that follow one another in a source.

    Attributes:
        values: of those that could be read: pixels, uint8 (n, C, size, size), or records as they are.
        labels: of those, int64 (n,).
        bad: name of each other one, and a line that says what is wrong.
    """

    values: NDArray[Any]
    labels: NDArray[np.int64]
    bad: list[tuple[str, str]]


def decoded(source: Source, image_size: int, parts: list[range], num_workers: int) -> Generator[Decoded]:
    """Yield the images of each part of a source, in order, centre-cropped as ADM does it.

    Args:
        source: where they are.
        image_size: side in pixels.
        parts: which images, a batch at a time.
        num_workers: processes that decode; 0 decodes here.
    """
    read = functools.partial(_image, source, image_size)
    return read_ahead(read, source.name, parts, num_workers)


def read_ahead(
    read: Callable[[int], tuple[NDArray[Any], int]], name: Callable[[int], str], parts: list[range], num_workers: int
) -> Generator[Decoded]:
    """Yield what is read of each part, in order.

    Args:
        read: returns an item's value and its label; an OSError or ValueError if it is damaged.
        name: returns an item's name.
        parts: which items, a batch at a time.
        num_workers: processes that read; 0 reads here.
    """
    loader = DataLoader(
        _Parts(read, name, parts),
        batch_size=None,
        shuffle=False,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=_ignore_interrupts,
    )
    yield from loader


def _as_it_is(part: Any) -> Any:
    return part


def _ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C to the process that writes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _image(source: Source, size: int, item: int) -> tuple[NDArray[np.uint8], int]:
    content, label = source.read(item)
    if isinstance(content, bytes):
        content = decode(content, size, source.name(item), still=True)
    elif content.shape[:2] != (size, size):
        content = resize_all(content[None], size)[0]
    return np.ascontiguousarray(content.transpose(2, 0, 1)), label


class _Parts(Dataset[Decoded]):
    def __init__(
        self, read: Callable[[int], tuple[NDArray[Any], int]], name: Callable[[int], str], parts: list[range]
    ) -> None:
        self._read, self._name, self._parts = read, name, parts

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> Decoded:
        if index >= len(self):
            raise IndexError(index)
        values, labels, bad = [], [], []
        for item in self._parts[index]:
            try:
                value, label = self._read(item)
            except (OSError, ValueError) as error:
                bad.append((self._name(item), " ".join(str(error).split())))
                continue
            values.append(value)
            labels.append(label)
        return Decoded(np.stack(values) if values else np.empty(0), np.array(labels, np.int64), bad)
