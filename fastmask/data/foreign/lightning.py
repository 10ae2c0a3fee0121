"""Importer for LightningDiT (arXiv 2501.01423): safetensors shards and normalisation statistics."""

import functools
import importlib
import os
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fastmask.data.latents import Record, ScaledBy, check_label
from fastmask.files import open_regular

STATISTICS = "latents_stats.pt"
_MAX_STATISTICS_BYTES = 1 << 20  # uncompressed; 32 channels take 2 kB
_FLOATS = {"F16", "BF16", "F32", "F64"}
_INTEGERS = {"I8", "U8", "I16", "I32", "I64"}


class LightningDiT:
    """Safetensors of `latents` and `latents_flip` (N, C, h, w), already sampled, and `labels` (N,), as `Latents`.

    Args:
        shards: paths of the shards, in order.

    Raises:
        ValueError: a shard is damaged or differs from the others in shape, or the statistics do not fit.
    """

    kind = "lightningdit"
    holds: Literal["moments", "latents"] = "latents"
    vae = "LightningDiT's tokenizer, which its files do not name"
    downsampling: int | None = None
    scaled_by: ScaledBy | None

    def __init__(self, shards: list[Path]) -> None:
        self._shards = shards
        first = _tensors(shards[0])
        self._shape = first["latents"][1][1:]
        self._names = ("latents", "latents_flip") if "latents_flip" in first else ("latents",)
        labels = [self._labels_of(shard) for shard in shards]
        self._labels = np.concatenate(labels)
        self._starts = np.cumsum([0] + [len(some) for some in labels[:-1]])
        flips = "with" if len(self._names) > 1 else "without"
        self.notes = [f"{len(shards)} shards, {flips} latents of flipped images (latents_flip)"]
        others = sorted(first.keys() - {*self._names, "labels"})
        if others:
            self.notes.append(f"left out: {', '.join(others)}")
        statistics = shards[0].with_name(STATISTICS)
        self.scaled_by = read_statistics(statistics, self._shape[0]) if statistics.exists() else None
        self.unscaled = f"{statistics} is not there"

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, item: int) -> str:
        """Return the shard's path and the index in it."""
        shard, row = self._place(item)
        return f"{self._shards[shard]}, latent {row}"

    def read(self, item: int) -> Record:
        """Return a latent (1 or 2, C, h, w), with the flipped image's last, and the label."""
        shard, row = self._place(item)
        opened = _open(self._shards[shard])
        values = torch.stack([opened.get_slice(name)[row] for name in self._names])
        return values.float().numpy(), int(self._labels[item])

    def _place(self, item: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._starts, item, side="right")) - 1
        return shard, item - int(self._starts[shard])

    def _labels_of(self, path: Path) -> NDArray[np.int64]:
        """Return the labels of a shard, after checking its shapes and types against the first shard."""
        found = _tensors(path)
        absent = [name for name in (*self._names, "labels") if name not in found]
        if absent:
            raise ValueError(f"{path} holds no `{absent[0]}`, but {', '.join(sorted(found)) or 'nothing'}")
        count = (found["labels"][1] or [0])[0]
        for name in (*self._names, "labels"):
            kind, shape = found[name]
            types, expected = (_INTEGERS, [count]) if name == "labels" else (_FLOATS, [count, *self._shape])
            if kind not in types or shape != expected or len(self._shape) != 3:
                raise ValueError(f"{path}: `{name}` is {kind} of shape {shape}, which does not fit the others")
        labels: NDArray[np.int64] = _open(path).get_tensor("labels").long().numpy()
        for label in (labels.min(initial=0), labels.max(initial=0)):
            check_label(int(label), f"{path}, latent {int(np.flatnonzero(labels == label)[0]) if count else 0}")
        return labels


def latent_shards(path: Path) -> list[Path]:
    """Return the safetensors shards of latents at a path or directly below it; empty if they hold anything else."""
    shards = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.suffix == ".safetensors" else []
    try:
        return shards if shards and "latents" in _tensors(shards[0]) else []
    except ValueError:
        return []


def read_statistics(path: Path, channels: int) -> ScaledBy:
    """Return scale and shift to mean 0 and standard deviation 1, from a file of per-channel `mean` and `std`.

    Raises:
        ValueError: the file holds anything but those two tensors, each with one finite number per channel.
    """
    try:
        os.close(open_regular(path))
        with zipfile.ZipFile(path) as file:
            size = sum(member.file_size for member in file.infolist())
        if size > _MAX_STATISTICS_BYTES:
            raise ValueError(f"it has {size:,} bytes")
        found = torch.load(path, map_location="cpu", weights_only=True)
        mean, std = (_numbers(found[name], channels) for name in ("mean", "std"))
    except Exception as error:
        # torch.load can raise any exception on a damaged file; weights_only restricts it to plain tensors.
        said = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        raise ValueError(
            f"{path} cannot be read as the `mean` and `std` of {channels} channels ({said}): give --latent-scale and "
            f"--latent-shift"
        ) from error
    if min(std) <= 0:
        raise ValueError(f"{path}: a deviation is {min(std):g}")
    return ScaledBy([1 / value for value in std], mean, f"{path.name}, to a mean of 0 and a deviation of 1")


def describe_safetensors(path: Path) -> str:
    """Return names, dtypes and shapes of the first tensors of a file; a ValueError if it cannot be read."""
    found = [f"{name} {kind} {shape}" for name, (kind, shape) in sorted(_tensors(path).items())]
    return ", ".join(found[:3]) + (", ..." if found[3:] else "")


def _numbers(tensor: Any, channels: int) -> list[float]:
    if not isinstance(tensor, torch.Tensor) or tensor.numel() != channels or not tensor.is_floating_point():
        raise ValueError(f"it holds {getattr(tensor, 'shape', type(tensor).__name__)}")
    values: list[float] = tensor.double().flatten().tolist()
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    return values


def _tensors(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Return the dtype and shape of each tensor of a file, by name."""
    opened = _open(path)
    slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (it is no dict)
    return {name: (str(found.get_dtype()), list(found.get_shape())) for name, found in slices.items()}


def _open(path: Path) -> Any:
    """Return an open file; safetensors checks its length against the header."""
    os.close(open_regular(path))
    found = os.stat(path)
    return _opened(path, os.getpid(), found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _opened(path: Path, process: int, size: int, changed: int) -> Any:
    """Map a file once per process, and again when it has changed."""
    safetensors = importlib.import_module("safetensors")
    try:
        return safetensors.safe_open(path, framework="pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
