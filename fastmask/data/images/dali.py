"""JPEG decoding with NVIDIA DALI: nvJPEG on a GPU, or its CPU operators.

Images are resized and cropped as in ADM (arXiv 2105.05233), see `resize_and_crop`. DALI's CPU operators decode to the
same values as Pillow. Resizing differs by one level of 255 where Pillow rounds between its passes, and by several
levels when an odd side is halved, since Pillow drops the middle row.
"""

import collections
import functools
import importlib
import importlib.util
import io
import itertools
import math
from collections.abc import Generator, Iterable, Iterator
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmask.data.images.pixels import load_pillow

Image = bytes | NDArray[np.uint8]
DecoderName = Literal["auto", "dali", "pil"]

_LONGEST_SIDE = 65535  # limit of the JPEG format
_AHEAD = 2  # prefetched batches


class HasImages(Protocol):
    """A batch of images, each a JPEG file (bytes) or pixels, uint8 (C, size, size)."""

    @property
    def values(self) -> list[Any]:
        """Return the images."""
        ...


P = TypeVar("P", bound=HasImages)


def pick_decoder(name: DecoderName) -> Literal["dali", "pil"]:
    """Resolve the decoder "auto": DALI if it is installed, otherwise Pillow; a ValueError for "dali" without DALI.

    The package name depends on the CUDA version (nvidia-dali-cuda130); plain `nvidia-dali` is not NVIDIA's.
    """
    installed = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if name == "dali" and not installed:
        raise ValueError(
            "--decoder dali: DALI is not installed: pip install nvidia-dali-cuda130, or give --decoder pil"
        )
    if name == "auto":
        return "dali" if installed else "pil"
    return name


def is_jpeg(content: bytes) -> bool:
    """Return whether a file's content is a JPEG."""
    return content.startswith(b"\xff\xd8\xff")


class JpegDecoder:
    """Decodes the JPEG files of batches, with prefetching.

    Args:
        size: side of the output in pixels.
        batch_size: maximum number of images per batch.
        device: device to decode on.
        num_threads: number of CPU threads.
    """

    def __init__(self, size: int, batch_size: int, device: torch.device, num_threads: int) -> None:
        self._size, self._batch_size, self._device, self._num_threads = size, batch_size, device, num_threads

    def ahead(self, parts: Iterable[P]) -> Iterator[tuple[P, Tensor | None]]:
        """Yield each batch with its pixels, uint8 (n, 3, size, size), on the device.

        The pixels are None for a batch without JPEG files, or with one that DALI cannot decode.
        """
        parts = iter(parts)
        # Read one batch first: the reader can fork workers, which should not inherit DALI's threads.
        feed = _Feed(itertools.chain(list(itertools.islice(parts, 1)), parts))
        while (yield from self._until_refused(feed)):
            feed = _Feed(itertools.chain(list(feed.waiting), feed.parts))

    def _until_refused(self, feed: "_Feed") -> Generator[tuple[Any, Tensor | None], None, bool]:
        """Yield batches as `ahead` does, until a decoding error (returns True; the pipeline is unusable) or the end."""
        pipeline = self._pipeline(feed)
        # DALI reuses the memory of its outputs only after the work queued on this stream.
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        while True:
            decoded = None
            try:
                (decoded,) = pipeline.run(stream)
            except StopIteration:
                return False
            except RuntimeError:
                if feed.error:
                    raise feed.error from None
            part = feed.waiting.popleft()
            yield part, self._placed(part, decoded) if decoded is not None and _jpegs(part) else None
            if decoded is None:
                return True

    def _placed(self, part: HasImages, decoded: Any) -> Tensor:
        """Return the pixels of a batch in order: the images that DALI decoded and the others."""
        pixels = torch.utils.dlpack.from_dlpack(decoded.as_tensor())
        if len(pixels) == len(part.values):
            return pixels.clone()  # DALI owns the memory
        placed = torch.empty((len(part.values), *pixels.shape[1:]), dtype=torch.uint8, device=pixels.device)
        others = [i for i, value in enumerate(part.values) if not isinstance(value, bytes)]
        jpegs = [i for i, value in enumerate(part.values) if isinstance(value, bytes)]
        placed[jpegs] = pixels
        placed[others] = torch.from_numpy(np.stack([part.values[i] for i in others])).to(pixels.device)
        return placed

    def _pipeline(self, feed: "_Feed") -> Any:
        dali = importlib.import_module("nvidia.dali")
        importlib.import_module("nvidia.dali.fn")
        importlib.import_module("nvidia.dali.math")
        on_gpu = self._device.type == "cuda"
        define = dali.pipeline_def(enable_conditionals=True)(_decode_and_crop)
        pipeline = define(
            dali,
            feed,
            self._size,
            "mixed" if on_gpu else "cpu",
            batch_size=self._batch_size,
            num_threads=self._num_threads,
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=_AHEAD,
        )
        pipeline.build()
        return pipeline


class _Feed:
    """DALI's external source: returns the JPEG files of the next batch.

    Attributes:
        parts: batches that are not yet requested.
        waiting: requested batches that DALI has not returned yet.
        error: the error raised while reading a batch, if any.
    """

    def __init__(self, parts: Iterator[Any]) -> None:
        self.parts = parts
        self.waiting: collections.deque[Any] = collections.deque()
        self.error: Exception | None = None

    def __call__(self) -> list[NDArray[np.uint8]]:
        try:
            part = next(self.parts)
        except Exception as error:
            self.error = None if isinstance(error, StopIteration) else error
            raise
        self.waiting.append(part)
        # A placeholder for a batch without JPEG files: each part stays one DALI batch, so that none is read far ahead.
        return _jpegs(part) or [_any_jpeg()]


@functools.cache
def _any_jpeg() -> NDArray[np.uint8]:
    file = io.BytesIO()
    load_pillow().new("RGB", (64, 64)).save(file, "JPEG")
    return np.frombuffer(file.getvalue(), np.uint8)


def _jpegs(part: HasImages) -> list[NDArray[np.uint8]]:
    return [np.frombuffer(value, np.uint8) for value in part.values if isinstance(value, bytes)]


def _decode_and_crop(dali: Any, feed: _Feed, size: int, device: str) -> Any:
    """Define the DALI graph that decodes, resizes and crops; DALI converts its conditions to operators."""
    fn, types = dali.fn, dali.types
    files = fn.external_source(source=feed, batch=True, dtype=types.UINT8, ndim=1)
    options = {"output_type": types.RGB, "adjust_orientation": False, "jpeg_fancy_upsampling": True}
    image = fn.decoders.image(files, device=device, **options)
    shape = fn.cast(fn.peek_image_shape(files, adjust_orientation=False), dtype=types.INT32)
    height, width = shape[0], shape[1]
    # Upper bound of the number of halvings.
    for _ in range(max(0, math.ceil(math.log2(_LONGEST_SIDE / size)))):
        if dali.math.min(height, width) >= 2 * size:
            height, width = height // 2, width // 2
            halved = fn.cast(fn.stack(height, width), dtype=types.FLOAT)
            # Linear interpolation halfway between two pixels is their mean, as in a box filter.
            image = fn.resize(image, size=halved, interp_type=types.INTERP_LINEAR, antialias=False)
    short = dali.math.min(height, width)
    new_height = (2 * height * size + short) // (2 * short)
    new_width = (2 * width * size + short) // (2 * short)
    top, left = (new_height - size) // 2, (new_width - size) // 2
    # Resize only the region inside the crop.
    vertical = height / fn.cast(new_height, dtype=types.FLOAT)
    horizontal = width / fn.cast(new_width, dtype=types.FLOAT)
    image = fn.resize(
        image,
        size=[size, size],
        roi_start=fn.stack(top * vertical, left * horizontal),
        roi_end=fn.stack((top + size) * vertical, (left + size) * horizontal),
        interp_type=types.INTERP_CUBIC,
        antialias=True,
    )
    return fn.transpose(image, perm=[2, 0, 1])
