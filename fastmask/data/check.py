"""Verifies a store: checksums, ranges, balance of classes, and statistics against the scale."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmask.data.manifest import Manifest, read_manifest
from fastmask.data.store import LatentStore, damaged_files

_SAMPLED = 2048  # records that statistics are taken of, evenly spread
_FITTING = 0.4, 2.0  # standard deviations that training expects, at most


class Found(NamedTuple):
    """What a check found.

    Attributes:
        manifest: the store's.
        lines: what the store holds.
        warnings: what is odd.
        damaged: a line for every file that is not what was written.
        images: some records as they are trained on, evenly spread and not mirrored, (n, C, H, W).
    """

    manifest: Manifest
    lines: list[str]
    warnings: list[str]
    damaged: list[str]
    images: Tensor


def check_store(path: Path) -> Found:
    """Return what is to say of a store; a ValueError if it cannot be opened."""
    manifest = read_manifest(path)
    damaged = list(damaged_files(path, manifest))
    both = manifest.kind != "pixels" and manifest.shape[0] == 2
    data = LatentStore(path, manifest.image_size, None, mirror=both)  # with the copies of mirrored images
    count = min(_SAMPLED, len(data))
    ids = np.arange(count) * len(data) // count
    stored, _ = data.read(ids)
    images = data.to_images(stored, 0, torch.arange(count))
    lines = [
        f"{manifest.count:,} records of {manifest.kind}, {manifest.dtype} {manifest.shape}, image_size "
        f"{manifest.image_size}, {len(manifest.shards)} shards",
        *_classes(manifest),
    ]
    if manifest.kind != "pixels":
        lines.append(
            f"VAE {manifest.vae}, sha256 {manifest.vae_sha256[:12] or 'unknown'}, scale {_shown(manifest.scale)}, "
            f"shift {_shown(manifest.shift)}"
        )
    mean, std = (_shown(values.tolist()) for values in (images.mean((0, 2, 3)), images.std((0, 2, 3))))
    lines.append(f"as trained on, of {count:,} images: mean {mean}, standard deviation {std} per channel")
    skipped = [name for shard in manifest.shards for name in shard.skipped]
    if skipped:
        lines.append(f"{len(skipped)} images were left out: {', '.join(skipped[:3])}{', ...' if skipped[3:] else ''}")
    upright = torch.from_numpy(ids < manifest.count)
    return Found(manifest, lines, _warnings(manifest, stored, images), damaged, images[upright])


def _warnings(manifest: Manifest, stored: Tensor, images: Tensor) -> list[str]:
    found = []
    empty = sum(count == 0 for count in manifest.class_counts)
    if empty:
        found.append(f"{empty} of {manifest.num_classes} classes have no record")
    if not stored.isfinite().all():
        found.append("some stored values are not finite")
        return found
    std = float(images.std())
    if manifest.kind != "pixels" and not _FITTING[0] <= std <= _FITTING[1]:
        found.append(
            f"the scale {_shown(manifest.scale)} brings the latents to a standard deviation of {std:.3g}, not near 1: "
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
        f"{len(counts)} classes of {int(np.median(counts)):,} records in the middle, from {counts[fewest]:,} "
        f"({names[fewest]}) to {counts[most]:,} ({names[most]})"
    ]


def _shown(values: float | list[float]) -> str:
    return " ".join(f"{value:.5g}" for value in (values if isinstance(values, list) else [values]))
