"""Importer for EDM2's layout, also used by REPA and its successors: `dataset.json`, and .npy of means and deviations.

EDM2 encodes images in [0, 1] and scales the latents to a standard deviation of 0.5 per channel (arXiv 2312.02696); REPA
(arXiv 2410.06940) encodes images in [-1, 1] and scales the latents by 0.18215. The files do not record which; it is
detected from the mean of the latents.
"""

import functools
import importlib
import os
import posixpath
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastmask.data.foreign.npy import parse_npy
from fastmask.data.latents import MAX_RECORD_BYTES, SCALE, Record, ScaledBy, check_label, check_latent, sample_records
from fastmask.files import read_regular

Variant = Literal["edm2", "repa"]

# EDM2's statistics of the raw latents. For images in [-1, 1] the means are below 1 on ImageNet.
_MEAN = [5.81, 3.25, 0.12, -2.15]
_STD = [4.17, 4.62, 3.71, 3.28]
_REPA_BELOW, _EDM2_ABOVE = 0.3, 0.7  # as fractions of EDM2's mean; between them the user has to decide
_MAX_LIST_BYTES = 1 << 32  # limit for dataset.json; ImageNet's has 60 MB

_SCALED = {
    "edm2": ScaledBy([0.5 / std for std in _STD], list(_MEAN), "EDM2's statistics, to a deviation of 0.5"),
    "repa": ScaledBy(SCALE, 0.0, "Stable Diffusion's KL-f8, as REPA trains on it"),
}
_VAES = {
    "edm2": "stabilityai/sd-vae-ft-mse, of images in [0, 1]",
    "repa": "stabilityai/sd-vae-ft-mse, of images in [-1, 1]",
}


class Edm2:
    """A zip or folder with `dataset.json` and .npy files of means and deviations (2C, h, w), as `Latents`.

    Args:
        path: path of the zip or folder.
        variant: origin of the latents; None detects it from the mean of a sample.

    Raises:
        ValueError: `dataset.json` is damaged, or names files outside the folder.
    """

    layout = "edm2-layout"
    holds: Literal["moments", "latents"] = "moments"
    downsampling: int | None = None

    def __init__(self, path: Path, variant: Variant | None = None) -> None:
        self._path = path
        self._files = self._listed()
        self.kind, self.vae, self.unscaled = self.layout, "not known", ""
        self.scaled_by: ScaledBy | None = None
        self.notes = list(self._left_out())
        if self._files:
            self._recognise(variant)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, item: int) -> str:
        """Return the path of the zip or folder, and the file's path inside it."""
        return f"{self._path}:{self._files[item][0]}"

    def read(self, item: int) -> Record:
        """Return the moments (1, 2C, h, w), means before log-variances, and the label."""
        name, label = self._files[item]
        content = _content(self._path, name, MAX_RECORD_BYTES)
        values = check_latent(parse_npy(content, self.name(item)), self.name(item), even=True)
        mean, std = np.split(values.astype(np.float32), 2)
        if std.min() < 0:
            raise ValueError(f"{self.name(item)} holds {std.min():g} where a deviation should be")
        return np.concatenate([mean, 2 * np.log(np.maximum(std, 1e-13))])[None], label  # log-variances, from -60

    def _listed(self) -> list[tuple[str, int]]:
        """Return names and labels of `dataset.json`."""
        where = f"{self._path}{'/' if self._path.is_dir() else ':'}dataset.json"
        msgspec = importlib.import_module("msgspec")
        try:
            content = _content(self._path, "dataset.json", _MAX_LIST_BYTES)
            found = msgspec.json.decode(content, type=dict[str, list[tuple[str, int]] | None])
        except (msgspec.DecodeError, RecursionError) as error:
            raise ValueError(f"{where} cannot be read: {error}".replace("`", "")) from error
        if found.get("labels") is None:
            raise ValueError(f"{where} lists no labels")
        for name, label in found["labels"]:
            check_label(label, f"{where}: {name}")
            if posixpath.isabs(name) or ".." in name.split("/") or "\0" in name or "\\" in name:
                raise ValueError(f"{where} names {name!r}, which is not a file in the folder")
        return list(found["labels"])

    def _left_out(self) -> Iterator[str]:
        """Yield a line about .npy files that `dataset.json` does not list, if there are any."""
        listed = {posixpath.normpath(name) for name, _ in self._files}
        others = [name for name in _arrays(self._path) if name not in listed]
        if others:
            yield f"left out: {len(others):,} .npy files that dataset.json does not list ({others[0]}, ...)"

    def _recognise(self, variant: Variant | None) -> None:
        """Set variant, VAE and scale, from the flag or the mean of the latents."""
        mean = self._mean()
        said = f"mean of channels {' '.join(f'{value:.3g}' for value in mean)}"
        if len(mean) != len(_MEAN):
            self.unscaled = f"scale and shift of latents of {len(mean)} channels are not known"
            self.kind = variant or self.layout
            self.notes.append(said)
            return
        self.downsampling = 8
        share = float(np.dot(mean, _MEAN) / np.dot(_MEAN, _MEAN))  # 1 where the mean is EDM2's, 0 where it is 0
        by_mean = "edm2" if share > _EDM2_ABOVE else "repa" if share < _REPA_BELOW else None
        taken = variant or by_mean
        whose = "EDM2's 5.81 3.25 0.12 -2.15, REPA's about 0"
        if taken is None:
            self.unscaled = f"the {said} is neither near {whose}: give --latents edm2 or --latents repa"
            return
        self.kind, self.vae, self.scaled_by = taken, _VAES[taken], _SCALED[taken]
        by = "as --latents says" if variant else f"by the {said} ({whose}); --latents decides otherwise"
        self.notes.append(f"taken for {taken}, {by}")
        if variant and by_mean not in (variant, None):
            self.notes.append(f"warning: the {said} is that of {by_mean} ({whose})")

    def _mean(self) -> NDArray[np.float64]:
        """Return the per-channel mean of a sample of records; a ValueError if none can be read."""
        records = [
            record[0, : record.shape[1] // 2] for record, _ in sample_records(self.read, len(self), str(self._path))
        ]
        alike = [record.mean((1, 2), dtype=np.float64) for record in records if len(record) == len(records[0])]
        mean: NDArray[np.float64] = np.mean(alike, axis=0)
        return mean


def is_edm2(path: Path) -> bool:
    """Return whether a path is a zip or folder in EDM2's layout."""
    if path.is_dir():
        return (path / "dataset.json").exists() and next(path.glob("*/*.npy"), None) is not None
    if path.suffix != ".zip" or not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        names = file.namelist()
    return "dataset.json" in names and any(name.endswith(".npy") for name in names)


def _arrays(path: Path) -> Iterator[str]:
    """Yield the paths of the .npy files inside a zip or folder."""
    if not path.is_dir():
        yield from (name for name in _zip(path, os.getpid()).namelist() if name.endswith(".npy"))
        return
    for folder, below, files in os.walk(path):
        below.sort()
        inside = os.path.relpath(folder, path)
        yield from (posixpath.normpath(posixpath.join(inside, name)) for name in sorted(files) if name.endswith(".npy"))


def _content(path: Path, name: str, max_bytes: int) -> bytes:
    """Return the content of a file in a zip or folder; a ValueError if it cannot be read or exceeds the limit."""
    if path.is_dir():
        return read_regular(path / name, max_bytes)
    try:
        file = _zip(path, os.getpid())
        if file.getinfo(name).file_size > max_bytes:
            raise ValueError(f"it has {file.getinfo(name).file_size:,} bytes, above the limit of {max_bytes:,}")
        return file.read(name)
    # zipfile raises RuntimeError for encryption, and its subclass NotImplementedError for unknown compression.
    except (KeyError, ValueError, RuntimeError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}:{name} cannot be read: {error}") from error


@functools.lru_cache(maxsize=1)
def _zip(path: Path, process: int) -> zipfile.ZipFile:
    """Open a zip once per process: listing a million members takes seconds."""
    return zipfile.ZipFile(path)
