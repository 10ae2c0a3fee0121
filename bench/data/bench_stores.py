"""Read throughput for moments of 256x256 images: the store and other formats, measured in one run.

A DataLoader reads one .npy per image, or LMDB in MaskDiT's layout, by the ids of the same random order; WebDataset
reads its tars sequentially and shuffles within a buffer. Each is used as documented, with the same records, and all
files are in the page cache, so the figures exclude disk reads. The copy is a memory copy of a batch. The first batch is
checked against the stored records before timing. `--full` also reads epochs of 131,072 records and measures memory.
"""

import contextlib
import importlib
import importlib.util
import io
import itertools
import os
import tarfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from bench.data.bench_loaders import write_store
from fastmask.data import batches, open_data, sample_ids

SEED = 0
RECORDS, BATCH = 8192, 256
TIMED = 32  # batches: once through
ROUNDS, WARMUP = 5, 1
SHUFFLED = 1000  # records in WebDataset's shuffle buffer
SHARDS = 8
LONG, EPOCHS = 131_072, 4  # of the long run
OPTIONAL = {"DataLoader over LMDB": "lmdb", "WebDataset": "webdataset"}
CPU = torch.device("cpu")

Pair = tuple[Any, Any]
Records = NDArray[np.float16]


class Files(Dataset[Pair]):
    """One .npy of moments per image, as written by extraction scripts."""

    def __init__(self, folder: Path, stored: Records, labels: NDArray[np.int64]) -> None:
        self._folder, self._labels = folder, labels
        folder.mkdir()
        for i, record in enumerate(stored):
            np.save(folder / f"{i}.npy", record)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> Pair:
        return np.load(self._folder / f"{i}.npy"), int(self._labels[i])


class Lmdb(Dataset[Pair]):
    """One file of keys and values: `z-0` the moments, `y-0` the label."""

    def __init__(self, folder: Path, stored: Records, labels: NDArray[np.int64]) -> None:
        self._folder, self._count, self._shape = folder, len(stored), stored.shape[1:]
        self._open: Any = None
        self._read: Any = None
        with self._environment(map_size=2 * stored.nbytes + 2**24) as environment, environment.begin(write=True) as put:
            for i, record in enumerate(stored):
                put.put(b"z-%d" % i, record.tobytes())
                put.put(b"y-%d" % i, b"%d" % labels[i])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Pair:
        if self._open is None:  # opened per worker
            self._open = self._environment(readonly=True, lock=False, readahead=False)
            self._read = self._open.begin(buffers=True)
        moments = np.frombuffer(self._read.get(b"z-%d" % i), np.float16).reshape(self._shape)
        return moments, int(bytes(self._read.get(b"y-%d" % i)))

    def close(self) -> None:
        """Close the LMDB after reading without workers: it must not be open when workers are forked."""
        if self._open is not None:
            self._read.abort()
            self._open.close()
            self._open = self._read = None

    def _environment(self, **options: Any) -> Any:
        return importlib.import_module("lmdb").open(str(self._folder), **options)


class Order:
    """The ids of every batch of a run."""

    def __iter__(self) -> Iterator[list[int]]:
        return (sample_ids(SEED, BATCH * i, BATCH, RECORDS).tolist() for i in itertools.count())


def read_items(dataset: Dataset[Pair], num_workers: int) -> Generator[Pair]:
    yield from DataLoader(dataset, batch_sampler=Order(), num_workers=num_workers)


def read_lmdb(dataset: Lmdb, num_workers: int) -> Generator[Pair]:
    try:
        yield from read_items(dataset, num_workers)
    finally:
        dataset.close()


def read_store(folder: Path, num_workers: int) -> Generator[Pair]:
    store = open_data(str(folder), image_size=256, num_classes=1000, flip=False)
    yield from batches(store, batch_size=BATCH, seed=SEED, start=0, stop=2**40, num_workers=num_workers, device=CPU)


def write_tars(folder: Path, stored: Records, labels: NDArray[np.int64]) -> list[str]:
    folder.mkdir()
    paths = [str(folder / f"{shard:05}.tar") for shard in range(SHARDS)]
    for shard, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for i in range(shard, len(stored), SHARDS):
                array = io.BytesIO()
                np.save(array, stored[i])
                for suffix, content in (("npy", array.getvalue()), ("cls", b"%d" % labels[i])):
                    about = tarfile.TarInfo(f"{i:08}.{suffix}")
                    about.size = len(content)
                    tar.addfile(about, io.BytesIO(content))
    return paths


def read_tars(paths: list[str], num_workers: int) -> Generator[Pair]:
    wds = importlib.import_module("webdataset")
    tars = wds.WebDataset(paths, shardshuffle=SHARDS, seed=SEED, empty_check=False).shuffle(SHUFFLED).decode()
    tars = tars.to_tuple("npy", "cls").batched(BATCH, partial=False).repeat()
    yield from wds.WebLoader(tars, batch_size=None, num_workers=num_workers)


def read_copies(stored: Records, labels: NDArray[np.int64]) -> Generator[Pair]:
    target = np.empty_like(stored[:BATCH])
    for first in itertools.cycle(range(0, len(stored) - BATCH + 1, BATCH)):
        np.copyto(target, stored[first : first + BATCH])
        yield target, labels[first : first + BATCH]


def moments(count: int) -> tuple[Records, NDArray[np.int64]]:
    """Any finite numbers, and labels."""
    random = np.random.default_rng(1)
    bits = random.integers(0, 0x7C00, (count, 8, 32, 32), np.uint16)  # infinity and NaN begin there
    return bits.view(np.float16), random.integers(1000, size=count)


def check(stored: Records, labels: NDArray[np.int64], batch: Pair, name: str) -> None:
    """Compare the first batch with the stored records; an AssertionError reports a difference."""
    number = {record[0, 0, :16].tobytes(): i for i, record in enumerate(stored)}
    values, given = (np.asarray(part) for part in batch)
    ids = [number[record[0, 0, :16].tobytes()] for record in values]
    assert len(set(ids)) == BATCH, f"{name}: {len(ids)} records, {len(set(ids))} of them different"
    assert np.array_equal(values, stored[ids]), f"{name}: the records are not those that were stored"
    assert np.array_equal(given, labels[ids]), f"{name}: the labels are not those of the records"
    if name not in ("WebDataset", "copy"):
        assert ids == next(iter(Order())), f"{name}: the records are not in the order that was asked for"


def prepared(folder: Path, stored: Records, labels: NDArray[np.int64]) -> dict[str, Callable[[int], Generator[Pair]]]:
    """Store the records in every installed format, and return the readers, functions of the number of workers."""
    write_store(folder / "store", stored[:, None], labels, len(stored) // SHARDS)
    files = Files(folder / "files", stored, labels)
    readers: dict[str, Callable[[int], Generator[Pair]]] = {
        "LatentStore": lambda workers: read_store(folder / "store", workers),
        "DataLoader over .npy": lambda workers: read_items(files, workers),
    }
    if _installed("DataLoader over LMDB"):
        lmdb = Lmdb(folder / "lmdb", stored, labels)
        readers["DataLoader over LMDB"] = lambda workers: read_lmdb(lmdb, workers)
    if _installed("WebDataset"):
        tars = write_tars(folder / "tars", stored, labels)
        readers["WebDataset"] = lambda workers: read_tars(tars, workers)
    return {**readers, "copy": lambda workers: read_copies(stored, labels)}


def _installed(name: str) -> bool:
    return importlib.util.find_spec(OPTIONAL[name]) is not None


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    stored, labels = moments(RECORDS)
    return stored, labels, prepared(tmp_path_factory.mktemp("kept"), stored, labels)


def take(
    readers: dict[str, Callable[[int], Generator[Pair]]],
    workers: int,
    rounds: int,
    progress: Callable[[Any, int, int], None] = lambda name, number, rounds: None,
) -> dict[str, list[float]]:
    """Return the milliseconds of ``TIMED`` batches, readers in turn; workers are restarted and run only while timed."""
    taken: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(1, rounds + 1):
        for name, read in readers.items():
            progress(name, number, rounds)
            with contextlib.closing(read(workers)) as parts:
                # Skip the prefetched batches.
                for _ in itertools.islice(parts, 1 + 2 * workers):
                    pass
                start = time.perf_counter()
                for _ in itertools.islice(parts, TIMED):
                    pass
                taken[name].append((time.perf_counter() - start) * 1e3)
    return taken


@pytest.mark.parametrize("num_workers", [0, 1, 2, 8])
def bench_reading(benchmark, kept, num_workers, noted, missing, progress):
    stored, labels, readers = kept
    for name, package in OPTIONAL.items():
        if name not in readers:
            missing(name, f"{package} is not installed (pip install {package})", f"{num_workers} workers")
    for name, read in readers.items():
        with contextlib.closing(read(num_workers)) as parts:
            check(stored, labels, next(parts), name)
    rounds = 1 if benchmark.disabled else ROUNDS + WARMUP
    with progress.of(f"reading, {num_workers} workers", 0) as told:
        taken = take(readers, num_workers, rounds, told)
    case = {"data": f"{RECORDS:,} moments 8x32x32 fp16", "image_size": 256, "shape": "8x32x32"}
    case |= {"batch": BATCH, "batches": TIMED, "num_workers": num_workers}
    for variant, times in taken.items():
        noted("store", case, variant, times[-ROUNDS:], CPU)


def own_mib() -> float:
    """Return the anonymous and shared memory of this process and its workers in MiB, without the page cache."""
    kib = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # a process that has ended
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            if os.getpid() in (int(fields["Pid"]), int(fields["PPid"])) and "RssAnon" in fields:
                kib += sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))
    return kib / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def bench_long_run(request, tmp_path, noted, progress):
    """Memory over epochs with more ids than are listed in memory."""
    if not request.config.getoption("full"):
        pytest.skip("writes a store of 2 GB: give --full")
    stored, labels = moments(LONG)
    write_store(tmp_path, stored[:, None], labels, LONG // SHARDS)
    del stored
    taken: list[float] = []
    times: list[float] = []
    with contextlib.closing(read_store(tmp_path, 2)) as parts, progress.of("long run", 0) as told:
        for epoch in range(1, EPOCHS + 1):
            told("LatentStore", epoch, EPOCHS)
            start = time.perf_counter()
            for number in range(LONG // BATCH):
                next(parts)
                if number == LONG // BATCH // 10:
                    taken.append(own_mib())
            times.append((time.perf_counter() - start) * 1e3)
        taken.append(own_mib())
    grown = max(taken[1:]) - taken[0]
    assert grown < 16, f"memory in MiB, of each epoch: {taken}"
    case = {"data": f"{LONG:,} moments 8x32x32 fp16, {EPOCHS} epochs", "image_size": 256, "shape": "8x32x32"}
    case |= {"batch": BATCH, "batches": LONG // BATCH, "num_workers": 2}
    noted("store", case, "LatentStore", times, CPU, own_mib=round(taken[0], 1), grown_mib=round(grown, 1))
