"""A store: what is trained on, prepared once, in memory-mapped shards of records of one size (docs/store.md)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmask.data.images import images_of
from fastmask.data.latents import Scaling, latents_of
from fastmask.data.manifest import DATA_OFFSET, Manifest, Shard, read_manifest, sha256_of

_OPEN_SHARDS = 256  # mapped at a time; each takes two file descriptors

Maps = tuple[NDArray[Any], NDArray[np.int32]]


class LatentStore:
    """A store as a `DataSet`.

    Where a copy of the mirrored image is stored, mirroring counts each image twice: id i + N is the mirrored one of
    id i, so a pass over the data takes every image and every mirror image once, and no more is read than is trained
    on. Pixels are mirrored when they are used.

    Args:
        path: the store's folder; `open_data` and `fastmask.data.remote.local_copy` fetch one from a URL.
        image_size: must be the store's.
        num_classes: labels must be below it; None takes the store's, 0 leaves the labels out.
        mirror: mirror each image with probability one half.
        manifest: of the store, where it is known before its files are there; None reads it, and looks at the files.

    Raises:
        ValueError: a store that is damaged, or not one of what is asked for.
    """

    def __init__(
        self, path: Path, image_size: int, num_classes: int | None, mirror: bool, manifest: Manifest | None = None
    ) -> None:
        self.manifest = manifest = manifest or read_manifest(path)
        if image_size != manifest.image_size:
            raise ValueError(f"{path} holds images of side {manifest.image_size}: image_size {image_size} is another")
        if num_classes and num_classes < manifest.num_classes:
            raise ValueError(f"{path} has {manifest.num_classes} classes, more than num_classes {num_classes}")
        if num_classes and not manifest.num_classes:
            raise ValueError(f"{path} has no labels, which num_classes {num_classes} asks for")
        if mirror and manifest.kind != "pixels" and manifest.shape[0] == 1:
            raise ValueError(f"{path} holds no latents of mirrored images: prepare it from images, without --no-mirror")
        if not manifest.count:
            raise ValueError(f"{path} holds no records")
        copies, channels, height, width = manifest.shape
        self._path, self._mirror = path, mirror
        self._copies = copies if mirror else 1
        self._shards = [shard for shard in manifest.shards if shard.count]
        self._starts = np.cumsum([0] + [shard.count for shard in self._shards[:-1]])
        self._maps: dict[int, Maps] = {}
        self._scaling = Scaling(manifest.scale, manifest.shift)
        self.shape = (channels // 2 if manifest.kind == "moments" else channels, height, width)
        self.num_classes = manifest.num_classes if num_classes is None else num_classes
        self.class_names = manifest.class_names[: self.num_classes]
        self.class_names += [str(label) for label in range(len(self.class_names), self.num_classes)]

    def __len__(self) -> int:
        return self.manifest.count * self._copies

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # another process maps the files itself

    def read(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return the pixels, uint8 (B, C, H, W), or moments or latents, float16, and labels (B,) of these ids."""
        copies, numbers = np.divmod(ids, self.manifest.count)
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        rows = numbers - self._starts[shards]
        stored = np.empty((len(ids), *self.manifest.shape[1:]), self.manifest.dtype)
        labels = np.zeros(len(ids), np.int64)
        for i, (shard, row, copy) in enumerate(zip(shards.tolist(), rows.tolist(), copies.tolist(), strict=True)):
            records, shard_labels = self._map(shard)
            stored[i] = records[row, copy]
            if self.num_classes:
                labels[i] = shard_labels[row]
        return torch.from_numpy(stored), torch.from_numpy(labels)

    def to_images(self, stored: Tensor, seed: int, sample: Tensor) -> Tensor:
        """Return pixels in [-1, 1], some of them mirrored, or latents drawn from the moments, anew at each visit."""
        if self.manifest.kind == "pixels":
            return images_of(stored, seed, sample, self._mirror)
        latents = latents_of(stored, seed, sample) if self.manifest.kind == "moments" else stored.float()
        return self._scaling.apply(latents)

    def _map(self, number: int) -> Maps:
        maps = self._maps.get(number)
        if maps is None:
            if len(self._maps) >= _OPEN_SHARDS:
                self._maps.pop(next(iter(self._maps)))
            maps = self._maps[number] = map_shard(self._path, self.manifest, self._shards[number])
        return maps


def map_shard(store: Path, manifest: Manifest, shard: Shard) -> Maps:
    """Return a shard's records (n, copies, channels, height, width) and labels (n,), both mapped from their files."""
    found = []
    for file, dtype, shape in ((shard.records, manifest.dtype, manifest.shape), (shard.labels, "int32", ())):
        little_endian = np.dtype(dtype).newbyteorder("<")
        shape = (shard.count, *shape)
        found.append(np.asarray(np.memmap(store / file.name, little_endian, "r", DATA_OFFSET, shape)))
    return found[0], found[1]


def damaged_files(store: Path, manifest: Manifest) -> Iterator[str]:
    """Yield a line for every file of a store whose checksum is not the manifest's."""
    for shard in manifest.shards:
        for file in (shard.records, shard.labels):
            if sha256_of(store / file.name) != file.sha256:
                yield f"{store / file.name} is damaged: its SHA-256 is not that of the manifest"
