"""The dataset of images decoded at each visit, as pixels or encoded to latents on the fly."""

import functools
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmask.data.fingerprint import fingerprint_of
from fastmask.data.images.dali import JpegDecoder
from fastmask.data.images.pixels import images_of
from fastmask.data.images.reader import ImageReader, Part, ReadItem, by_dali, read_part
from fastmask.data.images.replacing import Bad, read_or_replace
from fastmask.data.latents import latents_of
from fastmask.data.sources.source import Source
from fastmask.data.vae import Autoencoder


class ImageDataset:
    """A source's images as a `Dataset` of pixels, or of a VAE's latents, encoded at each visit.

    Args:
        source: the images.
        image_size: side in pixels.
        num_classes: labels must be below it; None takes the source's number, 0 omits the labels.
        flip: random horizontal flip (p = 0.5), before encoding.
        decoder: JPEG decoder in training; Pillow decodes all other formats.
        vae: encodes the images; None for pixels.
        skip_seed: seed for choosing replacements of images that cannot be read; None raises an error instead.

    Raises:
        ValueError: the labels do not fit, the first image cannot be read, or the VAE does not divide the side.
    """

    def __init__(
        self,
        source: Source,
        image_size: int,
        num_classes: int | None,
        flip: bool,
        decoder: Literal["dali", "pil"] = "pil",
        vae: Autoencoder | None = None,
        skip_seed: int | None = None,
    ) -> None:
        self.class_names = source.names_of(num_classes)
        self.decoder, self._vae = decoder, vae
        side = vae.side(image_size) if vae else image_size
        self.shape = (vae.channels if vae else source.channels, side, side)
        self.num_classes = len(self.class_names)
        self.latents = vae.space if vae else None
        self._count, self._size, self._flip = len(source), image_size, flip
        self._decode = ImageReader(source, image_size)
        self._keep_jpegs = ImageReader(source, image_size, keep_jpegs=True)
        self._read_all = read_or_refuse
        if skip_seed is not None:
            self._read_all = functools.partial(read_or_replace, seed=skip_seed, size=len(source))
        self.read(np.zeros(1, np.int64))  # a bad source fails here, not in the middle of an epoch

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_vae": None}  # workers read, they do not encode

    def read(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return the images, uint8 (B, C, H, W), decoded by Pillow, and labels (B,) of these ids."""
        return self.read_telling(ids)[:2]

    def read_telling(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor, Bad]:
        """Return images and labels as `read` does, and the images that could not be read and were replaced."""
        part = self._read_all(self._decode, ids.tolist())
        return torch.from_numpy(np.stack(part.values)), self._labels(part), part.bad

    def read_for_dali(self, ids: NDArray[np.int64]) -> Part:
        """Return the images of these ids for `decoded`, with JPEG files left undecoded."""
        return self._read_all(self._keep_jpegs, ids.tolist())

    def decoded(
        self, parts: Iterator[Part], batch_size: int, device: torch.device, num_threads: int
    ) -> Iterator[tuple[Tensor, Tensor, Bad]]:
        """Decode batches from `read_for_dali` on a device, and yield them as `read_telling` returns them.

        Args:
            parts: batches from `read_for_dali`.
            batch_size: maximum number of images per batch.
            device: device of decoding and of the result.
            num_threads: number of CPU threads that decode.
        """
        decoder = JpegDecoder(self._size, batch_size, device, num_threads)
        for part, pixels in by_dali(parts, self._keep_jpegs, decoder, self._read_all):
            yield pixels, self._labels(part), part.bad

    def to_images(self, stored: Tensor, seed: int, sample: Tensor) -> Tensor:
        """Return the images in [-1, 1], randomly flipped, or latents sampled from them at each visit."""
        images = images_of(stored, seed, sample, self._flip)
        if self._vae is None:
            return images
        return self._vae.scaling.apply(latents_of(self._vae.encode(images), seed, sample))

    def fingerprint(self) -> str:
        """Return a hash of the images, labels and VAE weights."""
        return fingerprint_of([self._decode.source.fingerprint(), self._vae.sha256 if self._vae else ""])

    def _labels(self, part: Part) -> Tensor:
        return torch.from_numpy(part.labels if self.num_classes else np.zeros_like(part.labels))


def read_or_refuse(read: ReadItem, items: list[int]) -> Part:
    """Read some items; a ValueError if one of them is damaged."""
    part = read_part(read, items)
    if part.bad:
        raise ValueError(f"{part.bad[0][1]} (fastmask.train --on-bad skip takes another in its place)")
    return part
