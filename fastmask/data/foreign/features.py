"""Importer for fast-DiT: folders `*_features` (I.npy, already sampled, flipped and scaled) and `*_labels`."""

import os
from pathlib import Path
from typing import Literal

import numpy as np

from fastmask.data.foreign.npy import parse_npy
from fastmask.data.latents import MAX_RECORD_BYTES, Record, ScaledBy, check_label, check_latent
from fastmask.files import read_regular


class Features:
    """Folders `*_features` and `*_labels` of I.npy: scaled latents (1, C, h, w) and labels (1,), as `Latents`."""

    kind = "fast-dit"
    holds: Literal["moments", "latents"] = "latents"
    vae = "stabilityai/sd-vae-ft-ema or -mse, scaled already"
    scaled_by: ScaledBy | None = ScaledBy(1.0, 0.0, "they are scaled already")
    unscaled = ""
    downsampling: int | None = 8

    def __init__(self, path: Path) -> None:
        folders = feature_folders(path)
        if len(folders) > 1:
            raise ValueError(
                f"{path} holds latents of several kinds ({', '.join(features.name for features, _ in folders)}): name "
                f"one of these folders"
            )
        self._features, self._labels = folders[0]
        names = {entry.name for entry in os.scandir(self._features)}
        self._count = sum(name.endswith(".npy") for name in names)
        absent = next((item for item in range(self._count) if f"{item}.npy" not in names), None)
        if absent is not None:
            raise ValueError(
                f"{self._features} holds {self._count:,} .npy files, but no {absent}.npy: which is missing?"
            )
        self.notes = [f"labels of {self._labels.name}"]
        others = sorted(name for name in names if not name.endswith(".npy"))
        if others:
            self.notes.append(f"left out: {len(others):,} files that are no .npy ({others[0]}, ...)")

    def __len__(self) -> int:
        return self._count

    def name(self, item: int) -> str:
        """Return the path of a file of latents."""
        return str(self._features / f"{item}.npy")

    def read(self, item: int) -> Record:
        """Return a latent (1, C, h, w) and its label."""
        values = parse_npy(read_regular(self.name(item), MAX_RECORD_BYTES), self.name(item))
        if values.ndim != 4 or len(values) != 1:
            raise ValueError(f"{self.name(item)} holds no latent, but {values.dtype} of shape {values.shape}")
        where = str(self._labels / f"{item}.npy")
        labels = parse_npy(read_regular(where, MAX_RECORD_BYTES), where)
        if labels.size != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{where} holds no label, but {labels.dtype} of shape {labels.shape}")
        return check_latent(values[0], self.name(item))[None], check_label(int(labels.item()), where)


def feature_folders(path: Path) -> list[tuple[Path, Path]]:
    """Return the pairs of feature and label folders at a path or directly below it."""
    if not path.is_dir():
        return []
    folders = [path] if path.name.endswith("_features") else sorted(path.glob("*_features"))
    pairs = [(folder, folder.with_name(f"{folder.name.removesuffix('_features')}_labels")) for folder in folders]
    return [(features, labels) for features, labels in pairs if labels.is_dir() and (features / "0.npy").exists()]
