"""Images decoded at each visit, as pixels, or encoded into latents on the way."""

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
        source: where they are.
        image_size: side in pixels.
        num_classes: labels must be below it; None takes the source's number, 0 leaves the labels out.
        flip: flip each image left to right with probability one half, before it is encoded.
        decoder: of JPEG files in training; Pillow decodes all others.
        vae: encodes the images.
        skip_seed: of the order in which others take the place of images that cannot be read; None: one is an error.

    Raises:
        ValueError: labels that do not fit, a first image that cannot be read, or a side that the VAE does not divide.
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
        self._count, self._size, self._flip = len(source), image_size, flip
        self._decode = ImageReader(source, image_size)
        self._keep_jpegs = ImageReader(source, image_size, keep_jpegs=True)
        self._read_all = read_or_refuse
        if skip_seed is not None:
            self._read_all = functools.partial(read_or_replace, seed=skip_seed, size=len(source))
        self.read(np.zeros(1, np.int64))  # a source of something else fails here, not in the middle of an epoch

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_vae": None}  # another process reads, it does not encode

    def read(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return the images, uint8 (B, C, H, W), decoded by Pillow, and labels (B,) of these ids."""
        return self.read_telling(ids)[:2]

    def read_telling(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor, Bad]:
        """Return what `read` does, and which images could not be read and were replaced."""
        part = self._read_all(self._decode, ids.tolist())
        return torch.from_numpy(np.stack(part.values)), self._labels(part), part.bad

    def read_for_dali(self, ids: NDArray[np.int64]) -> Part:
        """Return the images of these ids, JPEG files as they are, for `decoded`."""
        return self._read_all(self._keep_jpegs, ids.tolist())

    def decoded(
        self, parts: Iterator[Part], batch_size: int, device: torch.device, num_threads: int
    ) -> Iterator[tuple[Tensor, Tensor, Bad]]:
        """Yield what `read_telling` returns of what `read_for_dali` returned, decoded on a device.

        Args:
            parts: what it returned, of at most ``batch_size`` images each.
            batch_size: see parts.
            device: where to decode, and where the images stay.
            num_threads: of the CPU that decode.
        """
        decoder = JpegDecoder(self._size, batch_size, device, num_threads)
        for part, pixels in by_dali(parts, self._keep_jpegs, decoder, self._read_all):
            yield pixels, self._labels(part), part.bad

    def to_images(self, stored: Tensor, seed: int, sample: Tensor) -> Tensor:
        """Return the images in [-1, 1], some of them flipped, or latents of theirs, drawn freshly at each visit."""
        images = images_of(stored, seed, sample, self._flip)
        if self._vae is None:
            return images
        return self._vae.scaling.apply(latents_of(self._vae.encode(images), seed, sample))

    def fingerprint(self) -> str:
        """Return what tells these images, labels and the VAE's weights from others."""
        return fingerprint_of([self._decode.source.fingerprint(), self._vae.sha256 if self._vae else ""])

    def _labels(self, part: Part) -> Tensor:
        return torch.from_numpy(part.labels if self.num_classes else np.zeros_like(part.labels))


def read_or_refuse(read: ReadItem, items: list[int]) -> Part:
    """Return what is read of some items; a ValueError if one of them is damaged."""
    part = read_part(read, items)
    if part.bad:
        raise ValueError(f"{part.bad[0][1]} (--on-bad skip trains on another image in its place)")
    return part
