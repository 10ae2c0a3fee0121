"""Reads and decodes a source's images in worker processes."""

import contextlib
import ctypes
import functools
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from fastmask.console import say
from fastmask.data.images.dali import JpegDecoder, is_jpeg
from fastmask.data.images.pixels import decode, load_pillow, opened, orientation, resize_all
from fastmask.data.sources.source import Source

ReadItem = Callable[[int], tuple[Any, int]]

_PR_SET_PDEATHSIG = 1
_LOOKED_AT = 16  # images whose sides are compared with the requested one


class Part(NamedTuple):
    """Items of a source that were read together.

    Attributes:
        items: numbers of the items that could be read.
        values: one value per item: pixels, uint8 (C, size, size), a record, or the bytes of a JPEG file.
        labels: one label per item, int64 (n,).
        bad: number and error line of each item that could not be read.
    """

    items: list[int]
    values: list[Any]
    labels: NDArray[np.int64]
    bad: list[tuple[int, str]]


class Decoded(NamedTuple):
    """Consecutive items of a source.

    Attributes:
        values: values of the readable items: pixels, uint8 (n, C, size, size), or records.
        labels: labels of the readable items, int64 (n,).
        bad: name and error line of each item that could not be read.
    """

    values: NDArray[Any] | torch.Tensor
    labels: NDArray[np.int64]
    bad: list[tuple[str, str]]


def decoded(
    source: Source, image_size: int, parts: list[range], num_workers: int, dali: JpegDecoder | None = None
) -> Generator[Decoded]:
    """Yield the images of each part of a source, in order, resized and centre-cropped as in ADM.

    Args:
        source: the images.
        image_size: side in pixels.
        parts: item numbers of each batch.
        num_workers: worker processes that decode, or read files for DALI; 0 uses this process.
        dali: decoder of JPEG files; None decodes them with Pillow.
    """
    read = ImageReader(source, image_size, keep_jpegs=dali is not None)
    if dali is None:
        yield from read_ahead(read, source.name, parts, num_workers)
        return
    for part, values in by_dali(_parts_ahead(read, parts, num_workers), read, dali):
        yield Decoded(values, part.labels, [(source.name(item), line) for item, line in part.bad])


def read_ahead(
    read: Callable[[int], tuple[NDArray[Any], int]], name: Callable[[int], str], parts: list[range], num_workers: int
) -> Generator[Decoded]:
    """Read parts in worker processes and yield them in order.

    Args:
        read: returns an item's value and its label; an OSError or ValueError if it is damaged.
        name: returns an item's name.
        parts: item numbers of each batch.
        num_workers: worker processes that read; 0 uses this process.
    """
    for part in _parts_ahead(read, parts, num_workers):
        values = np.stack(part.values) if part.values else np.empty(0)
        yield Decoded(values, part.labels, [(name(item), line) for item, line in part.bad])


def by_dali(
    parts: Iterator[Part],
    read: "ImageReader",
    dali: JpegDecoder,
    read_all: Callable[[ReadItem, list[int]], Part] | None = None,
) -> Iterator[tuple[Part, torch.Tensor]]:
    """Decode parts with DALI and yield them, without damaged items, with their pixels, uint8 (n, C, size, size).

    Args:
        parts: JPEG files and pixels.
        read: the reader of the parts.
        dali: decoder of the JPEG files.
        read_all: reads items and handles damaged ones; default: `read_part`, which skips them.
    """
    for part, pixels in dali.ahead(parts):
        yield (part, pixels) if pixels is not None else _sorted_out(part, read, dali, read_all or read_part)


def _sorted_out(
    part: Part, read: "ImageReader", dali: JpegDecoder, read_all: Callable[[ReadItem, list[int]], Part]
) -> tuple[Part, torch.Tensor]:
    """Return the intact items of a part and their pixels: a part without JPEG files, or with one that DALI rejects.

    Pillow finds the damaged files. DALI then decodes the remaining JPEG files again, since the pixels of an image must
    not depend on the other images in the part.
    """
    known = dict(zip(part.items, zip(part.values, part.labels.tolist(), strict=True), strict=True))
    again = read_all(functools.partial(_decode_too, known, read), part.items)
    good = Part(again.items, [value for value, _ in again.values], again.labels, sorted(part.bad + again.bad))
    has_jpeg = any(isinstance(value, bytes) for value in good.values)
    if again.bad and has_jpeg:
        ((_, pixels),) = dali.ahead([good])
        if pixels is not None:
            return good, pixels
    if has_jpeg:
        say(f"DALI refused an image near {read.source.name(good.items[0])}, which Pillow decoded")
    return good, torch.from_numpy(np.stack([decoded for _, decoded in again.values])) if good.items else torch.empty(0)


def _decode_too(
    known: dict[int, tuple[Any, int]], read: "ImageReader", item: int
) -> tuple[tuple[Any, NDArray[np.uint8]], int]:
    """Return (value, pixels decoded by Pillow) and the label of an item, reading it if it is not known."""
    value, label = known[item] if item in known else read(item)
    return (value, read.pixels_of(value, item) if isinstance(value, bytes) else value), label


def read_part(read: ReadItem, items: range | list[int]) -> Part:
    """Read some items; an item whose read raises an OSError or ValueError is recorded as damaged."""
    good, values, labels, bad = [], [], [], []
    for item in items:
        try:
            value, label = read(item)
        except (OSError, ValueError) as error:
            bad.append((item, " ".join(str(error).split())))
            continue
        good.append(item)
        values.append(value)
        labels.append(label)
    return Part(good, values, np.array(labels, np.int64), bad)


class ImageReader:
    """Reads images of a source as pixels, uint8 (C, size, size), resized and centre-cropped as in ADM.

    Args:
        source: the images.
        size: side in pixels.
        keep_jpegs: return JPEG files undecoded, except those with an Exif rotation, which decoders handle differently.
    """

    def __init__(self, source: Source, size: int, *, keep_jpegs: bool = False) -> None:
        load_pillow()  # fail now if it is missing, else every image would count as damaged
        self.source, self._size, self._keep_jpegs = source, size, keep_jpegs

    def __call__(self, item: int) -> tuple[Any, int]:
        """Return an image and its label; a ValueError if it is damaged."""
        try:
            content, label = self.source.read(item)
        except OSError as error:
            raise ValueError(f"{self.source.name(item)} cannot be read as an image: {error}") from error
        if isinstance(content, bytes) and self._keep_jpegs and is_jpeg(content):
            with opened(content, self.source.name(item)) as image:
                if orientation(image) == 1:
                    return content, label
        return self.pixels_of(content, item), label

    def pixels_of(self, content: bytes | NDArray[np.uint8], item: int) -> NDArray[np.uint8]:
        """Return the pixels of a file's content, or of an array (H, W, C)."""
        if isinstance(content, bytes):
            pixels = decode(content, self._size, self.source.name(item))
        elif content.shape[:2] != (self._size, self._size):
            pixels = resize_all(content[None], self._size)[0]
        else:
            pixels = content
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def say_source(path: str, source: Source, image_size: int) -> None:
    """Print the detected format, skipped files, and whether images are resized or enlarged more than twice.

    Args:
        path: the path as given by the user.
        source: the opened source.
        image_size: side of the output in pixels. It is compared with the side of an array, or with a sample of the
            files.
    """
    for line in source.lines():
        say(f"{path}: {line}")
    if source.side not in (0, image_size):
        say(f"{path}: images are resized from a side of {source.side} to {image_size}")
        return
    count = min(_LOOKED_AT, len(source))
    sides = [_short_side(source, i * len(source) // count) for i in range(0 if source.side else count)]
    small = [side for side in sides if 0 < 2 * side < image_size]
    if small:
        say(
            f"{path}: {len(small)} of {count} images looked at are enlarged more than twice, from a side of "
            f"{min(small)} to {image_size}"
        )


def _short_side(source: Source, item: int) -> int:
    """Return the short side of a file's image, 0 if it cannot be read."""
    try:
        content = source.content(item)
        with opened(bytes(content), source.name(item)) as image:
            return int(min(image.size))
    except (OSError, ValueError):
        return 0


def _parts_ahead(read: ReadItem, parts: list[range], num_workers: int) -> Generator[Part]:
    loader = DataLoader(
        _Parts(read, parts),
        batch_size=None,
        shuffle=False,
        num_workers=num_workers,
        collate_fn=as_it_is,
        worker_init_fn=_ignore_interrupts,
    )
    yield from loader


def as_it_is(batch: Any) -> Any:
    """Return a batch unchanged: the collate function for datasets that return whole batches."""
    return batch


def _ignore_interrupts(worker: int) -> None:
    """Ignore Ctrl-C in a worker; the main process handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """Have Linux kill this process when the thread that started it ends, even by SIGKILL.

    Otherwise a worker that is blocked on a full pipe would outlive its parent forever.
    """
    with contextlib.suppress(OSError, AttributeError):  # other systems lack the call
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent and not parent.is_alive():  # it died before the call
        os._exit(1)


class _Parts(Dataset[Part]):
    def __init__(self, read: ReadItem, parts: list[range]) -> None:
        self._read, self._parts = read, parts

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> Part:
        if index >= len(self):
            raise IndexError(index)
        return read_part(self._read, self._parts[index])
