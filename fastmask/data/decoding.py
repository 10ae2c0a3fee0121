"""Decodes a source's images ahead of what stores them."""

import signal
from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from fastmask.data.images import decode, resize_all
from fastmask.data.sources import Source


class Decoded(NamedTuple):
    """Images that follow one another in a source.

    Attributes:
        pixels: of those that could be read, uint8 (n, C, size, size).
        labels: of those, int64 (n,).
        bad: name of each other one, and a line that says what is wrong.
    """

    pixels: NDArray[np.uint8]
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
    loader = DataLoader(
        _Parts(source, image_size, parts),
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


class _Parts(Dataset[Decoded]):
    def __init__(self, source: Source, image_size: int, parts: list[range]) -> None:
        self._source, self._size, self._parts = source, image_size, parts

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> Decoded:
        if index >= len(self):
            raise IndexError(index)
        pixels, labels, bad = [], [], []
        for item in self._parts[index]:
            try:
                image, label = self._read(item)
            except (OSError, ValueError) as error:
                bad.append((self._source.name(item), " ".join(str(error).split())))
                continue
            pixels.append(image)
            labels.append(label)
        shape = (len(pixels), self._size, self._size, self._source.channels)
        stacked = np.stack(pixels) if pixels else np.empty(shape, np.uint8)
        return Decoded(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2)), np.array(labels, np.int64), bad)

    def _read(self, item: int) -> tuple[NDArray[np.uint8], int]:
        content, label = self._source.read(item)
        if isinstance(content, bytes):
            return decode(content, self._size, self._source.name(item), still=True), label
        if content.shape[:2] != (self._size, self._size):
            content = resize_all(content[None], self._size)[0]
        return content, label
