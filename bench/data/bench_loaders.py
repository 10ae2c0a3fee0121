"""Loader throughput along the training path: `open_data`, `batches`, and `to_images` on each batch.

Every kind of data at 256x256, and the digits at 8x8, read by the training process or by one worker. The first batch is
checked against the stored data before timing. The files are in the page cache, so the figures exclude disk reads. For
reading alone, compared with other formats, see bench_stores. `--rows` stores the rows.
"""

import collections
import contextlib
import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench import rows
from fastmask.data import Dataset, batches, open_data
from fastmask.data.order import shuffled
from fastmask.data.store.manifest import Manifest
from fastmask.data.store.writer import StoreWriter

SEED = 0
BATCH = 32
BATCHES = 2  # per timed call
TIMES = {"rounds": 5, "warmup": 2}  # calls; the warm-up consumes the two batches that a worker prefetches
RECORDS = 2048  # records of moments
SCALE = 0.18215  # Stable Diffusion's scale of latents


class Source(NamedTuple):
    """Stored data with expected values, computed without the loader.

    Attributes:
        data: the name for `open_data`.
        what: description for a row.
        image_size: side in pixels.
        num_classes: number of classes.
        read: returns the stored values and the labels of ids.
        images: returns mean and standard deviation of the network's input from the stored values; deviation None:
            deterministic.
    """

    data: str
    what: str
    image_size: int
    num_classes: int
    read: Callable[[NDArray[np.int64]], tuple[Any, Any]]
    images: Callable[[Tensor], tuple[Tensor, Tensor | None]]


def moments(folder: Path) -> Source:
    stored, labels = _moments()
    np.savez(folder / "latents.npz", moments=stored, labels=labels)
    read = functools.partial(_rows_of, stored, labels)
    return Source(str(folder / "latents.npz"), "npz of 2048 moments 8x32x32 fp16", 256, 1000, read, _posterior)


def store(folder: Path) -> Source:
    """The same moments with a second copy for flipped images, in a store of eight shards."""
    stored, labels = _moments()
    write_store(folder / "store", np.stack([stored, stored[..., ::-1]], 1), labels, 256)
    read = functools.partial(_rows_of, stored, labels)
    return Source(str(folder / "store"), "store of 2048 moments 8x32x32 fp16", 256, 1000, read, _posterior)


def write_store(folder: Path, records: NDArray[np.float16], labels: NDArray[np.int64], shard_size: int) -> None:
    """Write a store of moments (N, copies, 8, 32, 32) with labels below 1000."""
    about = Manifest(
        kind="moments",
        dtype="float16",
        shape=(records.shape[1], *records.shape[2:]),
        image_size=256,
        crop="adm",
        num_classes=0,
        class_names=[],
        class_counts=[],
        scale=SCALE,
        source={"kind": "bench"},
        shards=[],
    )
    with StoreWriter(folder, about, len(records), shard_size) as writer:
        for number in writer.numbers():
            items = writer.items_of(number)
            with writer.shard(number) as shard:
                shard.add(records[items], labels[items])
        writer.finish([str(label) for label in range(1000)])


def image_array(folder: Path) -> Source:
    random = np.random.default_rng(2)
    stored = np.stack([picture(random, 256) for _ in range(256)])
    labels = random.integers(10, size=len(stored))
    np.savez(folder / "images.npz", images=stored, labels=labels)
    read = functools.partial(_rows_of, stored.transpose(0, 3, 1, 2), labels)
    return Source(str(folder / "images.npz"), "npz of 256 images 256x256", 256, 10, read, _pixels)


def image_folder(folder: Path, suffix: str) -> Source:
    """Images of twice the side, which are decoded and halved like photos."""
    pillow, random = importlib.import_module("PIL.Image"), np.random.default_rng(3)
    files = [folder / name / f"{number:03}.{suffix}" for name in ("cats", "dogs") for number in range(32)]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        # Fast compression, which hardly affects the decoding time.
        pillow.fromarray(picture(random, 512)).save(file, compress_level=1)

    def read(ids: NDArray[np.int64]) -> tuple[Any, Any]:
        whole = np.stack([np.asarray(pillow.open(files[i])) for i in ids]).astype(np.int64)
        wide = (whole[:, :, ::2] + whole[:, :, 1::2] + 1) // 2  # box filter of two pixels, rounded per axis
        halved = (wide[:, ::2] + wide[:, 1::2] + 1) // 2
        return halved.astype(np.uint8).transpose(0, 3, 1, 2), ids // 32

    return Source(str(folder), f"folder of {len(files)} {suffix} 512x512", 256, 2, read, _pixels)


def digits(folder: Path) -> Source:
    scans = importlib.import_module("sklearn.datasets").load_digits()
    order = np.random.default_rng(0).permutation(len(scans.target))[359:]  # the others are held out
    stored = (scans.images[order, None] / 8 - 1).astype(np.float32)
    read = functools.partial(_rows_of, stored, scans.target[order])
    return Source("digits", "digits 8x8", 8, 10, read, lambda stored: (stored, None))


def synthetic(folder: Path) -> Source:
    """Nothing is stored: a sample must be the same as when it is read alone."""
    alone = open_data("synthetic", image_size=256, num_classes=1000, flip=False)

    def read(ids: NDArray[np.int64]) -> tuple[Tensor, ...]:
        return tuple(map(torch.cat, zip(*(alone.read(ids[i : i + 1]) for i in range(len(ids))), strict=True)))

    def images(stored: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(stored), torch.ones_like(stored)

    return Source("synthetic", "synthetic latents", 256, 1000, read, images)


SOURCES = {
    "store": store,
    "moments": moments,
    "npz": image_array,
    "jpg": functools.partial(image_folder, suffix="jpg"),
    "png": functools.partial(image_folder, suffix="png"),
    "digits": digits,
    "synthetic": synthetic,
}


def opened(source: Source) -> Dataset:
    """Open a source's dataset, with Pillow, whose pixels are known; for DALI see bench_decoding."""
    size, classes = source.image_size, source.num_classes
    return open_data(source.data, image_size=size, num_classes=classes, flip=False, decoder="pil")


def training_batches(
    dataset: Dataset, num_workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the stored values, labels and images of each batch of an endless run, on the device."""
    parts = batches(dataset, batch_size=BATCH, seed=SEED, start=0, stop=2**40, num_workers=num_workers, device=device)
    for number, part in enumerate(parts):
        stored, labels = (tensor.to(device, non_blocking=True) for tensor in part)
        sample = torch.arange(number * BATCH, (number + 1) * BATCH, device=device)
        yield stored, labels, dataset.to_images(stored, SEED, sample)


def check(source: Source, size: int, stored: Tensor, labels: Tensor, images: Tensor) -> None:
    """Compare the first batch of a run over ``size`` samples with its source, and assert that they are equal."""
    ids = shuffled(SEED, 0, np.arange(BATCH), size)
    for name, actual, expected in zip(("stored values", "labels"), (stored, labels), source.read(ids), strict=True):
        expected = torch.as_tensor(expected)
        same = actual.dtype == expected.dtype and torch.equal(actual.cpu(), expected)
        assert same, f"{source.what}: {name} are not the source's"
    mean, deviation = source.images(stored.cpu())
    assert images.shape == mean.shape, f"{source.what}: images {tuple(images.shape)}, not {tuple(mean.shape)}"
    assert images.dtype == torch.float32, f"{source.what}: images in {images.dtype}"
    apart = images.cpu().double() - mean
    if deviation is None:
        assert apart.abs().max() <= 1e-6, f"{source.what}: images are not those of the stored values"
        return
    noise = apart / deviation
    bound = 6 / noise.numel() ** 0.5  # six standard errors
    unit = noise.mean().abs() <= bound and (noise.std() - 1).abs() <= bound
    assert unit, f"{source.what}: noise of mean {noise.mean():.3g} and deviation {noise.std():.3g}, not 0 and 1"


@pytest.fixture(scope="module", params=SOURCES)
def source(request, tmp_path_factory):
    return SOURCES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("num_workers", [0, 1])
def bench_loader(benchmark, source, num_workers, noted, progress):
    device = rows.default_device()
    dataset = opened(source)
    with contextlib.closing(training_batches(dataset, num_workers, device)) as parts:
        check(source, len(dataset), *next(parts))
        times = {"rounds": 1, "warmup": 0} if benchmark.disabled else TIMES
        variants = {type(dataset).__name__: lambda: collections.deque(itertools.islice(parts, BATCHES), maxlen=0)}
        with progress.of(source.what, times["warmup"]) as told:
            ((variant, taken),) = rows.take(variants, device, progress=told, **times).items()
    case = {
        "data": source.what,
        "image_size": source.image_size,
        "shape": "x".join(map(str, dataset.shape)),
        "batch": BATCH,
        "batches": BATCHES,
        "num_workers": num_workers,
    }
    noted("loader", case, variant, taken, device)


def _moments() -> tuple[NDArray[np.float16], NDArray[np.int64]]:
    random = np.random.default_rng(1)
    means = random.normal(0, 5, (RECORDS, 4, 32, 32))
    log_variances = random.uniform(-6, 0, means.shape)
    stored = np.concatenate([means, log_variances], axis=1).astype(np.float16)
    return stored, random.integers(1000, size=len(stored))


def _posterior(stored: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_variance = stored[:, :4].float(), stored[:, 4:].float()
    return SCALE * mean, SCALE * (log_variance / 2).exp()


def _rows_of(stored: NDArray[Any], labels: NDArray[Any], ids: NDArray[np.int64]) -> tuple[Any, Any]:
    return stored[ids], labels[ids].astype(np.int64)


def picture(random: np.random.Generator, side: int) -> NDArray[np.uint8]:
    """Return an image (side, side, 3) of soft shapes and a little grain, which compresses like a photo."""
    shapes = torch.from_numpy(random.normal(128, 60, (1, 3, 16, 16))).float()
    soft = torch.nn.functional.interpolate(shapes, (side, side), mode="bicubic")[0].permute(1, 2, 0).numpy()
    return (soft + random.normal(0, 4, soft.shape)).clip(0, 255).astype(np.uint8)


def _pixels(stored: Tensor) -> tuple[Tensor, None]:
    return stored.double() / 127.5 - 1, None
