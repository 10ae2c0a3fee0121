"""A teacher's features of a store's images: the source of a run's features, and the writer that adds them to a store.

The features of a shard's images are in one more file of the shard, `00000.features.npy`, float16 (n, patches, width).
They are of the unflipped images. The features of a flipped image are taken to be the same with the columns of the grid
reversed: a teacher trained with flips nearly agrees with that, and they take half the space.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmask.data.fingerprint import fingerprint_of
from fastmask.data.images.pixels import is_flipped
from fastmask.data.latents import all_finite
from fastmask.data.store.manifest import (
    DATA_OFFSET,
    MANIFEST,
    Features,
    Manifest,
    Shard,
    StoredFile,
    npy_header,
    parse_object,
    sha256_of,
)
from fastmask.data.store.reader import StoreDataset
from fastmask.files import atomic_write, read_regular, sync, write_durably
from fastmask.ranks import Ranks, barrier, from_first


class StoredFeatures:
    """The features in a store, as a `FeatureSource`.

    Args:
        store: the store.
        flip: whether its pixels are flipped at random; flipped latents have ids of their own.

    Raises:
        ValueError: the store has no features.
    """

    def __init__(self, store: StoreDataset, flip: bool) -> None:
        about = store.manifest.features
        if about is None:
            raise ValueError(
                f"{store.path} holds no features: python -m fastmask.prepare {store.path} --features TEACHER adds "
                f"them, with its images in front of a store of latents"
            )
        self._store, self._flip = store, flip and store.manifest.kind == "pixels"
        self.name, self.grid, self.width = about.teacher, about.grid, about.width
        files = [shard.features.sha256 for shard in store.manifest.shards if shard.features]
        self.identity = fingerprint_of([about.teacher, about.sha256, about.grid, about.width, *files])

    def reader(self, ids: NDArray[np.int64]) -> Tensor:
        """Return the features (B, L, W), float16, of samples; of flipped latents those of the flipped image."""
        features, copies = self._store.read_features(ids)
        flipped = torch.from_numpy(copies > 0)
        if flipped.any():
            features[flipped] = flip_grid(features[flipped], self.grid)
        return features

    def targets(self, images: Tensor, stored: Tensor | None, seed: int, sample: Tensor) -> Tensor:
        """Return the features of the images, which may be flipped, from those that were read."""
        assert stored is not None
        if not self._flip:
            return stored
        return torch.where(is_flipped(seed, sample)[:, None, None], flip_grid(stored, self.grid), stored)


def flip_grid(features: Tensor, grid: int) -> Tensor:
    """Return features (B, L, W) with the columns of their grid in reverse."""
    return features.view(len(features), grid, grid, -1).flip(2).flatten(1, 2)


def add_features(
    path: Path,
    manifest: Manifest,
    about: Features,
    compute: Callable[[int], Iterable[NDArray[np.float16]]],
    ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
) -> None:
    """Add features to a finished store; interrupted, the same call resumes after the last shard that was written.

    The manifest is replaced last, so a store has all features or none.

    Args:
        path: the store's folder, which the caller has locked.
        manifest: its manifest, without features.
        about: what the features are.
        compute: returns the features of a shard's images in batches, (n, patches, width) each.
        ranks: the processes, which share the shards; all must call this.

    Raises:
        ValueError: features that are not finite in float16, are of another shape or number, or cannot be written.
    """
    taken = {file.name for shard in manifest.shards for file in shard.files}
    for name in map(_name, range(len(manifest.shards))):
        if name in taken:  # a store that another program wrote may name its files so
            raise ValueError(f"{path / name} is a file of the store already")
    meet = barrier(ranks)
    for number in range(ranks.rank, len(manifest.shards), ranks.count):
        if _finished(path, number, about, manifest.shards[number]) is None:
            try:
                _write(path, number, about, manifest.shards[number].count, compute(number))
            except OSError as error:
                raise ValueError(
                    f"{error.filename or path} cannot be written: {error.strerror or error}; finished shards are kept, "
                    f"and the same command resumes"
                ) from error
    meet()
    from_first(ranks, lambda: _finish(path, manifest, about))


def _write(path: Path, number: int, about: Features, count: int, batches: Iterable[NDArray[np.float16]]) -> None:
    """Write the features of a shard, then the record that it is finished."""
    target, done = path / _name(number), 0
    with atomic_write(target) as partial, partial.open("wb") as file:
        file.write(npy_header(np.dtype("<f2"), (count, *about.shape)))
        for batch in batches:
            if batch.shape[1:] != about.shape or batch.dtype != np.float16:
                raise ValueError(f"features of {batch.dtype} {batch.shape[1:]} are not {about.shape} of float16")
            if not all_finite(batch):
                raise ValueError(f"{about.teacher} gives features that are not finite in float16")
            file.write(np.ascontiguousarray(batch.astype("<f2", copy=False)).data)
            done += len(batch)
        if done != count:
            raise ValueError(f"{path}: shard {number} holds {count} images, and {done} were given")
        sync(file)
    stored = StoredFile(target.name, target.stat().st_size, sha256_of(target))
    record = {"features": dataclasses.asdict(about), "file": dataclasses.asdict(stored)}
    write_durably(_record(path, number), json.dumps(record).encode())


def _finished(path: Path, number: int, about: Features, shard: Shard) -> StoredFile | None:
    """Return the file of a shard's features, None if it is not finished, or is of something else."""
    try:
        record = parse_object(read_regular(_record(path, number)), _record(path, number))
        stored = StoredFile(**record["file"])
        size = (path / stored.name).stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    length = DATA_OFFSET + shard.count * int(np.prod(about.shape)) * 2
    same = record.get("features") == dataclasses.asdict(about) and stored.name == _name(number)
    return stored if same and size == stored.bytes == length else None


def _finish(path: Path, manifest: Manifest, about: Features) -> None:
    found = [_finished(path, number, about, shard) for number, shard in enumerate(manifest.shards)]
    if None in found:
        raise ValueError(f"{path}: the features of shard {found.index(None)} are not finished")
    shards = [dataclasses.replace(s, features=file) for s, file in zip(manifest.shards, found, strict=True)]
    whole = dataclasses.replace(manifest, features=about, shards=shards)
    write_durably(path / MANIFEST, whole.to_json().encode())
    for number in range(len(shards)):
        _record(path, number).unlink(missing_ok=True)


def _name(number: int) -> str:
    return f"{number:05}.features.npy"


def _record(path: Path, number: int) -> Path:
    return path / f"{number:05}.features.json"
