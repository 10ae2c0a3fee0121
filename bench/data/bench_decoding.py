"""Decoding throughput of Pillow and, if installed, DALI, alone and within `prepare`, measured in one run.

The files are 500x375 JPEGs, ImageNet's most common size, resized and cropped to 256, in the page cache. A call reads
all of them, including start and exit of the worker processes. `prepare` stores pixels, so it only decodes and writes;
its throughput relative to the bare decoder shows its overhead. `--full` uses four times as many files, which reduces
the share of start and exit; both write four shards.
"""

import functools
import importlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import rows
from bench.data.bench_loaders import picture
from fastmask import prepare
from fastmask.data.images.dali import JpegDecoder, pick_decoder
from fastmask.data.images.pixels import decode
from fastmask.data.images.reader import decoded
from fastmask.data.sources.open import Source, open_source
from fastmask.training.report import console

PHOTOS, BATCH, SHARDS = 512, 32, 4
HEIGHT, WIDTH, SIZE = 375, 500, 256
TIMES = {"rounds": 3, "warmup": 1}
TOLERANCE = 1, 3  # levels of 255: maximum on a CPU (these sides are not halved), mean for nvJPEG
DEVICE = rows.default_device()


@pytest.fixture(scope="module")
def photos(request, tmp_path_factory):
    pillow, random = importlib.import_module("PIL.Image"), np.random.default_rng(5)
    folder = tmp_path_factory.mktemp("photos")
    for number in range(PHOTOS):
        pixels, file = picture(random, WIDTH)[:HEIGHT], io.BytesIO()
        pillow.fromarray(pixels).save(file, "JPEG", quality=90)
        for again in range(8 if request.config.getoption("full") else 2):
            (folder / f"{again}-{number:03}.jpg").write_bytes(file.getvalue())
    return folder


def bare(source: Source, num_workers: int, decoder: str) -> None:
    """Decode all images, and check their number."""
    parts = [range(first, first + BATCH) for first in range(0, len(source), BATCH)]
    dali = JpegDecoder(SIZE, BATCH, DEVICE, max(1, num_workers)) if decoder == "dali" else None
    assert sum(len(part.values) for part in decoded(source, SIZE, parts, num_workers, dali)) == len(source)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def prepared(folder: Path, store: Path, count: int, num_workers: int, decoder: str) -> None:
    """Prepare a store of all images."""
    options = ["--space", "pixel", "--image-size", str(SIZE), "--batch-size", str(BATCH)]
    options += ["--shard-size", str(count // SHARDS), "--decoder", decoder, "--num-workers", str(num_workers)]
    prepare.main([str(folder), str(store), *options])


def check(source: Source, decoder: str) -> None:
    """Compare the first images with Pillow's; an AssertionError reports the difference."""
    dali = JpegDecoder(SIZE, BATCH, DEVICE, 1) if decoder == "dali" else None
    (part,) = decoded(source, SIZE, [range(BATCH)], 0, dali)
    for item, pixels in enumerate(torch.as_tensor(part.values).cpu().numpy()):
        content, _ = source.read(item)
        expected = decode(content, SIZE, source.name(item)).transpose(2, 0, 1).astype(int)
        apart = np.abs(pixels - expected)
        most, mean = (255, TOLERANCE[1]) if decoder == "dali" and DEVICE.type == "cuda" else (TOLERANCE[0], 1)
        assert apart.max() <= most, f"{decoder}: {apart.max()} levels from Pillow's"
        assert apart.mean() <= mean, f"{decoder}: in the mean {apart.mean():.2f} levels from Pillow's"


@pytest.mark.parametrize("num_workers", [1, 2])
def bench_decoding(benchmark, photos, num_workers, tmp_path, noted, missing, progress, monkeypatch):
    monkeypatch.setattr(console, "quiet", True)
    source, store, variants = open_source(photos), tmp_path / "store", dict[str, Callable[[], None]]()
    if pick_decoder("auto") == "pil":
        missing("DALI", "it is not installed (pip install nvidia-dali-cuda130)", f"decoding, {num_workers} workers")
    for decoder in dict.fromkeys(("pil", pick_decoder("auto"))):
        check(source, decoder)
        name = {"pil": "Pillow", "dali": f"DALI on {DEVICE.type}"}[decoder]
        variants[name] = functools.partial(bare, source, num_workers, decoder)
        variants[f"prepare, {name}"] = functools.partial(prepared, photos, store, len(source), num_workers, decoder)
    times = {"rounds": 1, "warmup": 0} if benchmark.disabled else TIMES
    clear = functools.partial(shutil.rmtree, store, ignore_errors=True)
    with progress.of("decoding", times["warmup"] * len(variants)) as told:
        taken = rows.take(variants, torch.device("cpu"), before=clear, progress=told, **times)
    case = {"data": f"{len(source):,} jpg {WIDTH}x{HEIGHT}", "image_size": SIZE, "shape": f"3x{SIZE}x{SIZE}"}
    case |= {"batch": BATCH, "batches": len(source) // BATCH, "num_workers": num_workers}
    for variant, found in taken.items():
        noted("decoding", case, variant, found, DEVICE)
