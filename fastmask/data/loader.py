"""The order of samples, and batches of them.

A run is one endless row of samples: number n belongs to epoch n // N and is entry n % N of that epoch's permutation.
The row is a function of the seed alone, so any part of it can be read at any time: that is all there is to resuming.
"""

import functools
import traceback
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastmask.data.dataset import DataSet

Batch = tuple[Tensor, Tensor]


def sample_ids(seed: int, offset: int, count: int, size: int) -> NDArray[np.int64]:
    """Return the ids of samples ``offset`` .. ``offset + count - 1`` of a run over ``size`` samples, int64 (count,)."""
    number = np.arange(offset, offset + count)
    epochs, positions = number // size, number % size
    ids = np.empty(count, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        ids[here] = _permutation(seed, int(epoch), size)[positions[here]]
    return ids


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(size)


def batches(
    dataset: DataSet,
    *,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    num_workers: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Yield what is stored of samples ``start`` .. ``stop - 1`` of a run and their labels, in order, on the CPU.

    Args:
        dataset: where they are read.
        batch_size: samples at a time; the last batch may be smaller.
        seed: of the order.
        start: number of the first sample.
        stop: number after the last one.
        num_workers: processes that read ahead; 0 reads here. The samples are the same.
        device: where they will go: for a GPU they are put in pinned memory.

    Raises:
        ValueError: a sample that cannot be read.
    """
    rows = _Rows(dataset, batch_size, seed, start, stop)
    loader = DataLoader(
        rows,
        batch_size=None,
        shuffle=False,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=False,
    )
    try:
        yield from loader
    except ValueError as error:
        # Its frames hold the workers: stopped now they stop at once, by the garbage collector after ten seconds.
        traceback.clear_frames(error.__traceback__)
        # From a worker the message arrives below the worker's traceback.
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


class _Rows(Dataset[Batch]):
    """Batches by their number."""

    def __init__(self, dataset: DataSet, batch_size: int, seed: int, start: int, stop: int) -> None:
        self._dataset, self._batch_size, self._seed = dataset, batch_size, seed
        self._start, self._stop = start, stop

    def __len__(self) -> int:
        return -(-(self._stop - self._start) // self._batch_size)

    def __getitem__(self, index: int) -> Batch:
        if index >= len(self):
            raise IndexError(index)
        first = self._start + index * self._batch_size
        count = min(self._batch_size, self._stop - first)
        return self._dataset.read(sample_ids(self._seed, first, count, len(self._dataset)))
