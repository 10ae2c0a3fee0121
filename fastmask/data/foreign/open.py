"""Detection of the layout of latents that other projects have extracted, for import into a store."""

import dataclasses
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fastmask.data.foreign.edm2 import Edm2, Variant, is_edm2
from fastmask.data.foreign.features import Features, feature_folders
from fastmask.data.foreign.lightning import LightningDiT, describe_safetensors, latent_shards
from fastmask.data.foreign.maskdit import LatentTars, Lmdb, latent_tars
from fastmask.data.foreign.npy import parse_header
from fastmask.data.in_memory import NpzMoments, holds_moments
from fastmask.data.latents import Record, ScaledBy
from fastmask.files import open_regular

_LATENT_SUFFIXES = {".npy", ".latent", ".pt", ".pth", ".safetensors", ".mdb", ".h5", ".hdf5"}
_BESIDE = {".json", ".jsonl", ".txt", ".md", ".yaml", ".yml", ".log", ".csv"}
_LOOKED_AT = 1000  # files of a folder that are checked
_KNOWN = (
    "MaskDiT's LMDB or tars, fast-DiT's *_features and *_labels, EDM2's and REPA's dataset.json, LightningDiT's "
    "safetensors shards, an .npz of `moments`"
)


class Latents(Protocol):
    """Latents by number.

    Attributes:
        kind: name of the layout, for the manifest.
        holds: "moments" (means before log-variances) or "latents" (already sampled).
        vae: description of the VAE that encoded them.
        scaled_by: scale and shift for training; None if unknown.
        unscaled: the reason why scale and shift are unknown.
        downsampling: side of an image over the side of its latent; None if unknown.
        notes: lines to print: what was detected, and what is skipped and why.
    """

    kind: str
    holds: Literal["moments", "latents"]
    vae: str
    scaled_by: ScaledBy | None
    unscaled: str
    downsampling: int | None
    notes: list[str]

    def __len__(self) -> int: ...

    def name(self, item: int) -> str:
        """Return the location of a record, for messages."""
        ...

    def read(self, item: int) -> Record:
        """Return a record (copies, channels, height, width) and its label; an OSError or ValueError if damaged."""
        ...


def open_latents(path: Path, variant: Variant | None = None) -> Latents | None:
    """Open the latents at a path; None if there are none.

    Args:
        path: a file or folder.
        variant: which of the projects with EDM2's layout wrote them; None detects it from their mean.

    Raises:
        ValueError: the latents are damaged or in an unknown layout, or ``variant`` is given for another layout.
    """
    found = _open_known(path, variant)
    if found is None and (other := _other_latents(path)):
        raise ValueError(f"{path} holds arrays in no layout that is known ({other}); known are {_KNOWN}")
    if variant and not isinstance(found, Edm2):
        kind = found.kind if found else "no latents"
        raise ValueError(f"--latents {variant} decides between projects with EDM2's layout: {path} is {kind}")
    return found


def layout_of(path: Path) -> str:
    """Return the layout of the latents at a path, "" if it is not one that `open_latents` supports."""
    if (path / "data.mdb").exists():
        return Lmdb.kind
    if holds_moments(path):
        return NpzMoments.kind
    if latent_tars(path):
        return LatentTars.kind
    if feature_folders(path):
        return Features.kind
    if is_edm2(path):
        return Edm2.layout
    return LightningDiT.kind if latent_shards(path) else ""


def _open_known(path: Path, variant: Variant | None) -> Latents | None:
    match layout_of(path):
        case Lmdb.kind:
            return Lmdb(path)
        case NpzMoments.kind:
            return NpzMoments(path)
        case LatentTars.kind:
            return LatentTars(latent_tars(path))
        case Features.kind:
            return Features(path)
        case Edm2.layout:
            return Edm2(path, variant)
        case LightningDiT.kind:
            return LightningDiT(latent_shards(path))
    return None


@dataclasses.dataclass(frozen=True)
class HalfRecords:
    """Reads records in the format of a store.

    Attributes:
        latents: the latents to read.
        shape: shape of each record, (copies, channels, height, width).
        copies: number of copies to keep.
    """

    latents: Latents
    shape: tuple[int, ...]
    copies: int

    def __call__(self, item: int) -> tuple[NDArray[np.float16], int]:
        """Return a record in float16 and its label; a ValueError if it is damaged, misshapen or not finite."""
        values, label = self.latents.read(item)
        if values.shape != self.shape:
            raise ValueError(
                f"{self.latents.name(item)} holds a latent of shape {values.shape[1:]} in {values.shape[0]} copies, "
                f"not {self.shape[1:]} in {self.shape[0]} as others do"
            )
        with np.errstate(over="ignore"):
            record = values[: self.copies].astype(np.float16)
        if not np.isfinite(record).all():
            raise ValueError(f"{self.latents.name(item)} holds values that are not finite in float16")
        return record, label


def _other_latents(path: Path) -> str:
    """Describe the first array file at a path that holds almost only arrays; else ""."""
    names = [""] if path.is_file() else list(itertools.islice(_names_below(path), _LOOKED_AT))
    files = [path / name for name in names]
    first = next((file for file in files if file.suffix in _LATENT_SUFFIXES), None)
    if first is None or any(file.suffix not in _LATENT_SUFFIXES | _BESIDE for file in files):
        return ""
    return f"{first.relative_to(path) if names[0] else first.name}: {_described(first)}"


def _names_below(path: Path) -> Iterator[str]:
    for folder, below, files in os.walk(path):
        below.sort()
        yield from (os.path.relpath(os.path.join(folder, name), path) for name in sorted(files) if name[0] != ".")


def _described(file: Path) -> str:
    """Return the dtype and shape of a file's content, as far as its first bytes tell."""
    try:
        if file.suffix == ".safetensors":
            return describe_safetensors(file)
        with open(open_regular(file), "rb") as opened:
            header = parse_header(opened.read(2**16), file.name)
    except (OSError, ValueError):
        return f"a {file.suffix} of another kind"
    return f"{header.dtype} of shape {header.shape}"
