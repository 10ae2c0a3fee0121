"""Verification of a store: checksums, headers, labels, ranges, class balance, and statistics of scaled latents."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmask.console import printable
from fastmask.data.latents import shown
from fastmask.data.store.manifest import MANIFEST, Manifest, first_few, parse_object, read_manifest
from fastmask.data.store.reader import StoreDataset, damaged_files, map_shard
from fastmask.files import read_regular

_SAMPLED = 2048  # evenly spaced records for statistics
FITTING = 0.4, 2.0  # accepted range of the standard deviation in training


class Found(NamedTuple):
    """The result of a check.

    Attributes:
        manifest: the store's manifest.
        lines: description of the store's content.
        warnings: suspicious findings.
        damaged: one line per mismatch with the manifest.
        images: evenly spaced records, scaled as in training and not flipped, (n, C, H, W); empty if the store is
            damaged.
    """

    manifest: Manifest
    lines: list[str]
    warnings: list[str]
    damaged: list[str]
    images: Tensor


def check_store(path: Path) -> Found:
    """Verify a store; a ValueError if it cannot be opened."""
    manifest = read_manifest(path)
    damaged = [*damaged_files(path, manifest), *_contradictions(path, manifest)]
    lines = [
        f"{manifest.count:,} records of {manifest.kind}, {manifest.dtype} {manifest.shape}, image_size "
        f"{manifest.image_size}, {len(manifest.shards)} shards",
        *_classes(manifest),
    ]
    if manifest.kind != "pixels":
        lines.append(
            f"VAE {printable(manifest.vae)}, sha256 {manifest.vae_sha256[:12] or 'unknown'}, scale "
            f"{shown(manifest.scale)}, shift {shown(manifest.shift)}"
        )
    if manifest.features:
        about = manifest.features
        lines.append(
            f"features of {printable(about.teacher)}, sha256 {about.sha256[:12]}, {about.grid} x {about.grid} patches "
            f"of {about.width} values"
        )
    skipped = [name for shard in manifest.shards for name in shard.skipped]
    if skipped:
        lines.append(f"{len(skipped)} images were left out: {first_few(skipped)}")
    warnings = []
    if "checksum" not in parse_object(read_regular(path / MANIFEST), path / MANIFEST):
        warnings.append(
            f"{MANIFEST} carries no checksum of itself, as those of earlier versions: whether its scale, shift and "
            f"class names are those that were written is not known"
        )
    try:
        images, upright = _sample(path, manifest)
    except ValueError as error:
        return Found(manifest, lines, warnings, damaged or [str(error)], torch.empty(0))
    mean, std = (shown(values.tolist()) for values in (images.mean((0, 2, 3)), images.std((0, 2, 3))))
    lines.append(f"as trained on, of {len(images):,} images: mean {mean}, standard deviation {std} per channel")
    return Found(manifest, lines, warnings + _warnings(manifest, images), damaged, images[upright])


def _sample(path: Path, manifest: Manifest) -> tuple[Tensor, Tensor]:
    """Return evenly spaced records, scaled as in training, and a mask of those that are not flipped."""
    both = manifest.kind != "pixels" and manifest.shape[0] == 2
    data = StoreDataset(path, manifest.image_size, None, flip=both)  # with the copies of flipped images
    count = min(_SAMPLED, len(data))
    ids = np.arange(count) * len(data) // count
    images = data.to_images(data.read(ids)[0], 0, torch.arange(count))
    return images, torch.from_numpy(ids < manifest.count)


def _contradictions(path: Path, manifest: Manifest) -> Iterator[str]:
    """Yield a line for each shard, and for class counts, that contradict the manifest."""
    counts = np.zeros(manifest.num_classes, np.int64)
    for shard in manifest.shards:
        try:
            labels = map_shard(path, manifest, shard).labels
        except ValueError as error:
            yield str(error)
            return
        if manifest.num_classes:
            counts += np.bincount(labels, minlength=manifest.num_classes)
    wrong = np.flatnonzero(counts != np.array(manifest.class_counts, np.int64))
    if len(wrong):
        first = int(wrong[0])
        yield (
            f"{path / MANIFEST} is damaged: {counts[first]:,} records have label {first} "
            f"({printable(manifest.class_names[first])}), and it says {manifest.class_counts[first]:,}"
        )


def _warnings(manifest: Manifest, images: Tensor) -> list[str]:
    found = []
    empty = sum(count == 0 for count in manifest.class_counts)
    if empty:
        found.append(f"{empty} of {manifest.num_classes} classes have no record")
    std = float(images.std())
    if manifest.kind != "pixels" and not FITTING[0] <= std <= FITTING[1]:
        found.append(
            f"the scale {shown(manifest.scale)} brings the latents to a standard deviation of {std:.3g}, not near 1: "
            f"is it that of another VAE?"
        )
    flat = (images.flatten(1).std(1) == 0).sum()
    if flat:
        found.append(f"{flat} of {len(images)} records are of one value throughout")
    return found


def _classes(manifest: Manifest) -> list[str]:
    if not manifest.num_classes:
        return ["no labels"]
    counts, names = np.array(manifest.class_counts), manifest.class_names
    most, fewest = int(counts.argmax()), int(counts.argmin())
    return [
        f"{len(counts)} classes, median {int(np.median(counts)):,} records, from {counts[fewest]:,} "
        f"({printable(names[fewest])}) to {counts[most]:,} ({printable(names[most])})"
    ]
