"""The data loader: batches of samples in a seeded order.

A run is an infinite sequence of samples: sample n belongs to epoch n // N, at position n % N of that epoch's order. The
sequence is a function of the seed alone, so a run resumes from the sample number, without any loader state.
"""

import collections
import contextlib
import itertools
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from fastmask.data.dataset import Dataset
from fastmask.data.images.dataset import ImageDataset
from fastmask.data.images.reader import as_it_is, end_with_parent
from fastmask.data.images.replacing import Bad, BadImages
from fastmask.data.order import shuffled
from fastmask.data.store.verify import Verifier
from fastmask.models.condition import Condition

# Samples as stored, and their condition; then a teacher's features, where they are asked for.
Batch = tuple[Tensor, Condition] | tuple[Tensor, Condition, Tensor]


def sample_ids(seed: int, offset: int, count: int, size: int) -> NDArray[np.int64]:
    """Return the ids of samples ``offset`` .. ``offset + count - 1`` of a run over ``size`` samples, int64 (count,)."""
    number = np.arange(offset, offset + count)
    epochs, positions = number // size, number % size
    ids = np.empty(count, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        ids[here] = shuffled(seed, int(epoch), positions[here], size)
    return ids


def batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    num_workers: int,
    device: torch.device,
    step_size: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    verifier: Verifier | None = None,
    bad_images: BadImages | None = None,
    features: Callable[[NDArray[np.int64]], Tensor] | None = None,
    features_stop: int = 0,
) -> Generator[Batch, None, None]:
    """Yield samples ``start`` .. ``stop - 1`` of a run, as stored, and their condition, in order, on a device.

    With several ranks, each step's samples are split among them in rank order. The workers end with the thread that
    requests the first batch.

    Args:
        dataset: the dataset.
        batch_size: samples per batch; the last batch can be smaller.
        seed: seed of the order.
        start: number of the first sample.
        stop: number after the last sample.
        num_workers: worker processes that read ahead; 0 reads in this process. The samples are the same.
        device: device of the batches. Copies to a GPU use pinned memory and a stream of their own, and overlap with
            computation.
        step_size: samples per step on all ranks, a multiple of ``ranks * batch_size``, which is the default.
        rank: this process's rank.
        ranks: world size.
        verifier: verifies the dataset's files in the background; polled at each batch.
        bad_images: records the images that could not be read and were replaced.
        features: reads the features of some ids, for datasets that are stored.
        features_stop: number of the sample from which on no features are read.

    Raises:
        ValueError: a sample cannot be read, too many were replaced, or a file does not match its checksum.
    """
    bad_images = bad_images or BadImages()
    step_size = ranks * batch_size if step_size is None else step_size
    if step_size % (ranks * batch_size):
        raise ValueError(f"a step of {step_size} samples does not divide into batches of {batch_size} on {ranks} ranks")
    steps, share = range(start, stop, step_size), step_size // ranks
    images = dataset if isinstance(dataset, ImageDataset) else None
    dali = images if images and images.decoder == "dali" else None
    read = dali.read_for_dali if dali else images.read_telling if images else dataset.read
    shares = range(rank * share, (rank + 1) * share, batch_size)
    rows = _Rows(read, len(dataset), batch_size, seed, steps, shares, stop, features, features_stop)
    loader = DataLoader(
        rows,
        batch_size=None,
        shuffle=False,
        num_workers=num_workers,
        collate_fn=as_it_is,
        pin_memory=device.type == "cuda" and not dali,  # batches for DALI hold files, not tensors
        persistent_workers=False,
        worker_init_fn=_ignore_signals,
    )
    source = _Source(iter(loader))
    parts: Iterator[Any] = source
    if dali:
        parts = dali.decoded(source, batch_size, device, max(1, num_workers))
    told: collections.deque[Bad] = collections.deque()  # bad images of prefetched batches
    if images:
        parts = _telling(parts, told)
    try:
        for batch in to_gpu(parts, device) if device.type == "cuda" else parts:
            if verifier:
                verifier.poll()
            if told:
                bad_images.add(len(batch[0]), told.popleft())
            yield batch
    except ValueError as error:
        traceback.clear_frames(error.__traceback__)  # the frames keep the workers alive
        # A worker's error carries its traceback; the message is the last line.
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
    finally:
        source.close()


def _telling(parts: Iterator[tuple[Tensor, Condition, Bad]], told: "collections.deque[Bad]") -> Iterator[Batch]:
    """Yield batches, and queue the images that could not be read for `batches`."""
    for stored, condition, bad in parts:
        told.append(bad)
        yield stored, condition


class _Source(Iterator[Any]):
    """Sole owner of the DataLoader iterator, so that `close` stops its workers at once, not after ten seconds."""

    def __init__(self, parts: Iterator[Any]) -> None:
        self._parts: Iterator[Any] | None = parts

    def __next__(self) -> Any:
        if self._parts is None:
            raise StopIteration
        return next(self._parts)

    def close(self) -> None:
        """Kill the workers, which ignore signals, and wait for their end: otherwise Python would wait at exit."""
        workers = list(getattr(self._parts, "_workers", []))
        with _deaths_ignored():
            for worker in workers:
                worker.kill()
            for worker in workers:
                worker.join()
        self._parts = None


@contextlib.contextmanager
def _deaths_ignored() -> Iterator[None]:
    """Disable torch's SIGCHLD handler, which raises an error for a worker that was killed on purpose."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)  # None: not installed by Python


def to_gpu(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy batches of pinned tensors to a GPU, one batch ahead of the computation."""
    copies, ahead = torch.cuda.Stream(device), None  # type: ignore[no-untyped-call]
    for batch in itertools.chain(batches, [None]):
        moved = None
        if batch is not None:
            with torch.cuda.stream(copies):
                moved = tree_map(lambda tensor: tensor.to(device, non_blocking=True), batch), copies.record_event()
        if ahead is not None:
            ready, copied = ahead
            computing = torch.cuda.current_stream(device)
            computing.wait_event(copied)
            for tensor in tree_leaves(ready):
                tensor.record_stream(computing)  # its memory is reused only after the computation
            yield ready
        ahead = moved


def _ignore_signals(worker: int) -> None:
    """Ignore signals in a worker, which a signal to the process group reaches too; the trainer handles them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


class _Rows(TorchDataset[Any]):
    """A rank's batches by number, as a map-style dataset.

    Args:
        read: returns the batch of some ids.
        size: size of the dataset.
        batch_size: samples per batch.
        seed: seed of the order.
        steps: first sample of each step.
        parts: offset of each of the rank's batches in a step.
        stop: number after the last sample.
        features: reads the features of some ids, which are added to the batch.
        features_stop: number of the sample from which on they are not.
    """

    def __init__(
        self,
        read: Callable[[NDArray[np.int64]], Any],
        size: int,
        batch_size: int,
        seed: int,
        steps: range,
        parts: range,
        stop: int,
        features: Callable[[NDArray[np.int64]], Tensor] | None,
        features_stop: int,
    ) -> None:
        self._features, self._features_stop = features, features_stop
        self._read, self._size, self._batch_size, self._seed = read, size, batch_size, seed
        self._steps, self._parts, self._stop = steps, parts, stop

    def __len__(self) -> int:
        if not self._steps:
            return 0
        left = min(self._parts.stop, self._stop - self._steps[-1]) - self._parts.start  # in the last step
        return (len(self._steps) - 1) * len(self._parts) + max(0, -(-left // self._batch_size))

    def __getitem__(self, index: int) -> Any:
        if index >= len(self):
            raise IndexError(index)
        step, part = divmod(index, len(self._parts))
        first = self._steps[step] + self._parts[part]
        count = min(self._batch_size, self._stop - first)
        ids = sample_ids(self._seed, first, count, self._size)
        batch = self._read(ids)
        return batch if self._features is None or first >= self._features_stop else (*batch, self._features(ids))
