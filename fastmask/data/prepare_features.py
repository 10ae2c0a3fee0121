"""Computes a teacher's features for a finished store: of its pixels, or of the images that its latents are of."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastmask.console import printable, say
from fastmask.data.images.dali import DecoderName, JpegDecoder, pick_decoder
from fastmask.data.images.reader import decoded
from fastmask.data.sources.open import open_source
from fastmask.data.sources.source import Source, labels_sha256, names_sha256
from fastmask.data.store.features import add_features
from fastmask.data.store.manifest import Features, Manifest, Shard, read_manifest
from fastmask.data.store.reader import map_shard
from fastmask.data.teacher import Teacher
from fastmask.ranks import Ranks

Images = Callable[[int], Iterator[torch.Tensor]]  # of a shard, in batches, uint8 (n, C, H, W)


def prepare_features(
    store: Path,
    source: str,
    teacher: str,
    grid: int | None,
    *,
    device: torch.device,
    ranks: Ranks,
    batch_size: int,
    num_workers: int,
    decoder: DecoderName,
    num_classes: int | None,
) -> None:
    """Compute the features of a store's images, and add them to the store, which the caller has locked.

    Args:
        store: the store's folder.
        source: for a store of latents, the images that it was made from; "" for pixels.
        teacher: name of a `Teacher`.
        grid: side of the grid of patches; None is that of patches of 2 x 2 latents.
        device: device of the teacher and of DALI.
        ranks: the processes, which share the shards.
        batch_size: images per batch.
        num_workers: see `decoded`.
        decoder: JPEG decoder.
        num_classes: as it was given when the store was made; the order of the labels is checked too.

    Raises:
        ValueError: the store has features of something else, or the images are not those of the store in its order.
    """
    manifest = read_manifest(store)
    if manifest.kind == "pixels" and source:
        raise ValueError(f"{store} holds the images themselves: leave {source} out")
    if manifest.kind != "pixels" and not source:
        raise ValueError(
            f"{store} holds {manifest.kind}, and features are those of images: python -m fastmask.prepare IMAGES "
            f"{store} --features {teacher}, with the images that it was made from"
        )
    if grid is None and manifest.kind == "pixels":
        raise ValueError("give --features-grid: the image size over the patch size of the network to be trained")
    grid = grid or manifest.shape[2] // 2
    if manifest.features and (manifest.features.teacher, manifest.features.grid) == (teacher, grid):
        say(f"{store}: its features are there already")
        return
    if manifest.features:
        has = f"{printable(manifest.features.teacher)}, {manifest.features.grid} x {manifest.features.grid}"
        raise ValueError(f"{store} holds features of {has} already: take a copy of the store from before")
    images = _stored(store, manifest, batch_size)
    if source:
        given = open_source(Path(source), labelled=num_classes != 0)
        _check_source(store, manifest, source, given, num_classes)
        dali = None
        if pick_decoder(decoder) == "dali":
            dali = JpegDecoder(manifest.image_size, batch_size, device, max(1, num_workers))
        images = _decoded(manifest, given, batch_size, num_workers, dali)
    network = Teacher(teacher, grid, device)
    about = Features(teacher, network.sha256, network.precision, grid, network.width)
    say(f"{store}: features of {teacher}, {grid} x {grid} patches of {network.width} values")

    def compute(number: int) -> Iterator[NDArray[np.float16]]:
        for batch in images(number):
            yield network(batch.to(device).float() / 127.5 - 1).half().cpu().numpy()
        say(f"{store}: features of shard {number + 1} of {len(manifest.shards)}")

    add_features(store, manifest, about, compute, ranks)


def _check_source(store: Path, manifest: Manifest, path: str, source: Source, num_classes: int | None) -> None:
    """Raise a ValueError unless these are the images of a store's latents, in the same order."""
    made_of = manifest.source
    if manifest.crop != "adm" or "sha256" not in made_of:
        raise ValueError(f"{store} holds imported latents, and of which images, in which order, is not known")
    same = len(source) == made_of.get("items") and names_sha256(path, len(source), source.name) == made_of["sha256"]
    if same:
        labels = source.labels
        there = None if labels is None else labels_sha256(source.names_of(num_classes), labels)
        same = there == made_of.get("labels_sha256")
    if not same:
        raise ValueError(
            f"{path} holds other images or labels than those that {store} was made from, or in another order: give the "
            f"same images, with the same --num-classes"
        )


def _stored(store: Path, manifest: Manifest, batch_size: int) -> Images:
    def images(number: int) -> Iterator[torch.Tensor]:
        records = map_shard(store, manifest, manifest.shards[number]).records
        for first in range(0, len(records), batch_size):
            yield torch.from_numpy(records[first : first + batch_size, 0].copy())

    return images


def _decoded(manifest: Manifest, source: Source, batch_size: int, num_workers: int, dali: JpegDecoder | None) -> Images:
    starts = np.cumsum([0] + [_items(shard) for shard in manifest.shards]).tolist()

    def images(number: int) -> Iterator[torch.Tensor]:
        shard, stop = manifest.shards[number], starts[number + 1]
        parts = [range(at, min(at + batch_size, stop)) for at in range(starts[number], stop, batch_size)]
        for batch in decoded(source, manifest.image_size, parts, num_workers, dali):
            for name, line in batch.bad:
                if name not in shard.skipped:
                    raise ValueError(f"{line} (it was readable when the store was made)")
            if len(batch.labels):
                yield torch.as_tensor(batch.values)

    return images


def _items(shard: Shard) -> int:
    """Return the number of items of the source that a shard is of."""
    return shard.count + len(shard.skipped)
