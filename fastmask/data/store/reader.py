"""The store reader: memory-mapped shards of fixed-size records (docs/store.md)."""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmask.console import printable
from fastmask.data.fingerprint import fingerprint_of
from fastmask.data.foreign.npy import parse_header
from fastmask.data.images.pixels import images_of
from fastmask.data.latents import ScaledBy, Scaling, all_finite, latents_of
from fastmask.data.store.manifest import DATA_OFFSET, Manifest, Shard, StoredFile, first_few, read_manifest, sha256_of
from fastmask.diffusion.origin import LatentSpace
from fastmask.files import open_regular

_OPEN_FILES = 512  # mapped at the same time; each takes a file descriptor


class StoreDataset:
    """A store as a `Dataset`.

    If the store has copies of flipped images, ``flip`` doubles the dataset: id i + N is the flipped image i, so an
    epoch visits every image and every flipped image once, and only the requested copy is read. Pixels are flipped at
    each visit instead.

    Args:
        path: the store's folder; `open_data` and `fastmask.data.store.remote.local_copy` fetch one from a URL.
        image_size: must be the store's.
        num_classes: labels must be below it; None takes the store's number, 0 omits the labels.
        flip: random horizontal flip (p = 0.5).
        manifest: manifest of a store whose files are not fetched yet; None reads it and checks the files.

    Attributes:
        path: the store's folder.
        manifest: the store's manifest.

    Raises:
        ValueError: the store is damaged, or does not fit the arguments.
    """

    def __init__(
        self, path: Path, image_size: int, num_classes: int | None, flip: bool, manifest: Manifest | None = None
    ) -> None:
        self.manifest = manifest = manifest or read_manifest(path)
        if image_size != manifest.image_size:
            side = manifest.image_size
            raise ValueError(f"{path} holds images of side {side}, not {image_size}: give --image-size {side}")
        if num_classes and num_classes < manifest.num_classes:
            raise ValueError(f"{path} has {manifest.num_classes} classes, more than num_classes {num_classes}")
        if num_classes and not manifest.num_classes:
            raise ValueError(f"{path} has no labels, but num_classes is {num_classes}")
        if flip and manifest.kind != "pixels" and manifest.shape[0] == 1:
            raise ValueError(f"{path} holds no latents of flipped images: prepare it from images, without --no-flip")
        if not manifest.count:
            raise ValueError(f"{path} holds no records")
        copies, channels, height, width = manifest.shape
        self.path, self._flip = path, flip
        self._copies = copies if flip else 1
        self._shards = [shard for shard in manifest.shards if shard.count]
        self._starts = np.cumsum([0] + [shard.count for shard in self._shards[:-1]])
        self._maps: dict[int, MappedShard] = {}
        self._scaling = Scaling(manifest.scale, manifest.shift)
        self.shape = (channels // 2 if manifest.kind == "moments" else channels, height, width)
        self.num_classes = manifest.num_classes if num_classes is None else num_classes
        self.class_names = manifest.class_names[: self.num_classes]
        self.class_names += [str(label) for label in range(len(self.class_names), self.num_classes)]

    @property
    def latents(self) -> LatentSpace | None:
        """The latents that the input is of, None for pixels."""
        stored = self.manifest
        if stored.kind == "pixels":
            return None
        return LatentSpace(vae=stored.vae, sha256=stored.vae_sha256, scale=stored.scale, shift=stored.shift)

    def __len__(self) -> int:
        return self.manifest.count * self._copies

    def describe(self) -> str:
        """Describe the store's content in one line."""
        manifest, names = self.manifest, self.class_names
        classes = f"{len(names):,} classes ({first_few(names)})" if names else "no labels"
        skipped = sum(len(shard.skipped) for shard in manifest.shards)
        line = f"a store of {manifest.count:,} {manifest.kind} {manifest.shape}, {classes}"
        if skipped:
            line += f", {skipped:,} images left out when it was made"
        if manifest.kind == "pixels":
            return line
        said_by = f"its manifest; VAE {printable(manifest.vae)}" if manifest.vae else "its manifest"
        return f"{line}, {ScaledBy(manifest.scale, manifest.shift, said_by)}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # workers map the files themselves

    def read(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return the pixels, uint8 (B, C, H, W), or moments or latents, float16, and labels (B,) of these ids.

        Raises:
            ValueError: a file does not match the manifest, a value is not finite, or a label is not below the number of
                classes; the message names the file.
        """
        copies, shards, rows = self._places(ids)
        stored = np.empty((len(ids), *self.manifest.shape[1:]), self.manifest.dtype)
        labels = np.zeros(len(ids), np.int64)
        for i, (shard, row, copy) in enumerate(zip(shards.tolist(), rows.tolist(), copies.tolist(), strict=True)):
            mapped = self._map(shard)
            stored[i] = mapped.records[row, copy]
            if self.num_classes:
                labels[i] = mapped.labels[row]
        if stored.dtype == np.float16 and not all_finite(stored):
            bad = int(np.flatnonzero(~np.isfinite(stored).reshape(len(ids), -1).all(1))[0])
            name = self._shards[shards[bad]].records.name
            raise ValueError(f"{self.path / name}: record {rows[bad]} holds values that are not finite")
        return torch.from_numpy(stored), torch.from_numpy(labels)

    def read_features(self, ids: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
        """Return the features of the images of these ids, float16 (B, patches, width), and which copies the ids are of.

        The features are those of the unflipped image for both copies, 0 and 1.

        Raises:
            ValueError: the store has no features, a file does not match the manifest, or a value is not finite.
        """
        about = self.manifest.features
        if about is None:
            raise ValueError(f"{self.path} holds no features")
        copies, shards, rows = self._places(ids)
        found = np.empty((len(ids), *about.shape), "<f2")
        for i, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            features = self._map(shard).features
            assert features is not None
            found[i] = features[row]
        if not all_finite(found):
            bad = int(np.flatnonzero(~np.isfinite(found).reshape(len(ids), -1).all(1))[0])
            name = self._shards[shards[bad]].files[-1].name
            raise ValueError(f"{self.path / name}: features of record {rows[bad]} are not finite")
        return torch.from_numpy(found), copies

    def _places(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return copy, shard and row of each id, of shards that are mapped and not cut."""
        copies, numbers = np.divmod(ids, self.manifest.count)
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        for shard in np.unique(shards).tolist():
            self._map(shard).check_length()
        return copies, shards, numbers - self._starts[shards]

    def fingerprint(self) -> str:
        """Return a hash of records, labels and scale, from the manifest's checksums."""
        manifest = self.manifest
        shards = [(shard.count, shard.records.sha256, shard.labels.sha256) for shard in manifest.shards if shard.count]
        about = manifest.kind, manifest.dtype, manifest.shape, _numbers(manifest.scale), _numbers(manifest.shift)
        return fingerprint_of([*about, *shards])

    def to_images(self, stored: Tensor, seed: int, sample: Tensor) -> Tensor:
        """Return pixels in [-1, 1], randomly flipped, or scaled latents, sampled from moments at each visit."""
        if self.manifest.kind == "pixels":
            return images_of(stored, seed, sample, self._flip)
        latents = latents_of(stored, seed, sample) if self.manifest.kind == "moments" else stored.float()
        return self._scaling.apply(latents)

    def _map(self, number: int) -> "MappedShard":
        mapped = self._maps.get(number)
        if mapped is None:
            if len(self._maps) >= _OPEN_FILES // len(self._shards[number].files):
                self._maps.pop(next(iter(self._maps)))
            try:
                mapped = self._maps[number] = map_shard(self.path, self.manifest, self._shards[number])
            except OSError as error:  # the file existed when the store was opened
                raise ValueError(f"{self.path} cannot be read any more: {error}") from error
        return mapped


class MappedShard(NamedTuple):
    """The records (n, copies, channels, height, width) and labels (n,) of a shard, memory-mapped.

    So are its features (n, patches, width); None in a store without them.
    """

    records: NDArray[Any]
    labels: NDArray[np.int32]
    files: list[tuple[Path, mmap.mmap]]
    features: NDArray[np.float16] | None = None

    def check_length(self) -> None:
        """Raise a ValueError if a mapped file was truncated: reading beyond its end kills the process (SIGBUS)."""
        for path, mapped in self.files:
            if mapped.size() < len(mapped):
                raise ValueError(
                    f"{path} was cut to {mapped.size():,} of {len(mapped):,} bytes while it was in use: copy it again"
                )


def map_shard(store: Path, manifest: Manifest, shard: Shard) -> MappedShard:
    """Map a shard into memory.

    Raises:
        ValueError: size, dtype or shape of a file do not match the manifest, or a label is not below the number of
            classes.
    """
    records, records_map = _map_file(store, shard.records, manifest.dtype, (shard.count, *manifest.shape))
    labels, labels_map = _map_file(store, shard.labels, "int32", (shard.count,))
    highest = manifest.num_classes - 1
    if manifest.num_classes and len(labels) and not 0 <= labels.min() <= labels.max() <= highest:
        row = int(np.flatnonzero((labels < 0) | (labels > highest))[0])
        raise ValueError(
            f"{store / shard.labels.name}: record {row} has label {labels[row]}, which is outside 0 .. {highest}"
        )
    files = [(store / shard.records.name, records_map), (store / shard.labels.name, labels_map)]
    if manifest.features is None or shard.features is None:
        return MappedShard(records, labels, files)
    features, features_map = _map_file(store, shard.features, "float16", (shard.count, *manifest.features.shape))
    return MappedShard(records, labels, [*files, (store / shard.features.name, features_map)], features)


def _map_file(store: Path, file: StoredFile, dtype: str, shape: tuple[int, ...]) -> tuple[NDArray[Any], mmap.mmap]:
    path = store / file.name
    descriptor = open_regular(path)
    try:
        length = os.fstat(descriptor).st_size
        if length != file.bytes:
            raise ValueError(f"{path} has {length:,} bytes instead of {file.bytes:,}: copy it again")
        mapped = mmap.mmap(descriptor, length, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    expected, header = np.dtype(dtype).newbyteorder("<"), parse_header(mapped[:DATA_OFFSET], str(path))
    if header != (expected, False, shape, DATA_OFFSET):
        raise ValueError(
            f"{path} holds {header.dtype} of shape {header.shape} by its header, and {expected} of shape {shape} by "
            f"the manifest"
        )
    if not shape[0]:
        return np.empty(shape, expected), mapped  # np.frombuffer rejects an empty view
    return np.frombuffer(mapped, expected, offset=DATA_OFFSET).reshape(shape), mapped


def _numbers(values: float | list[float]) -> list[float]:
    return [float(value) for value in (values if isinstance(values, list) else [values])]


def damaged_files(store: Path, manifest: Manifest) -> Iterator[str]:
    """Yield a line for each file whose checksum does not match the manifest."""
    for shard in manifest.shards:
        for file in shard.files:
            if sha256_of(store / file.name) != file.sha256:
                yield f"{store / file.name} is damaged: its SHA-256 is not that of the manifest"
