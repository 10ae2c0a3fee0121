"""Importers for MaskDiT: its LMDB, and its WebDataset tars of pickled arrays."""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastmask.data.foreign.pickled import unpickle_array
from fastmask.data.latents import SCALE, Record, ScaledBy, check_label, check_latent
from fastmask.data.sources.tar import WebDataset


class _MaskDiT:
    holds: Literal["moments", "latents"] = "moments"
    vae = "Stable Diffusion KL-f8, MaskDiT's autoencoder_kl.pth"
    scaled_by: ScaledBy | None = ScaledBy(SCALE, 0.0, "Stable Diffusion's KL-f8, as MaskDiT trains on it")
    unscaled = ""
    downsampling: int | None = 8


class Lmdb(_MaskDiT):
    """An LMDB with keys `z-I` (float32 moments), `y-I` (the label in digits) and `length`, as `Latents`.

    Flipped images, if present, are the second half of the keys, in the same order: this is detected from labels that
    repeat and moments that look flipped.
    """

    kind = "maskdit-lmdb"

    def __init__(self, path: Path) -> None:
        self._path = path
        total = self._total()
        labels = np.array([self._label(item, text) for item, text in enumerate(self._label_texts(total))], np.int64)
        half = total // 2
        self._count, self._copies = total, 1
        self.notes = [f"{total:,} keys z-I"]
        if total > 1 and total % 2 == 0 and np.array_equal(labels[:half], labels[half:]):
            self._count, self._copies = half, 2
            if self._second_half_is_flipped():
                self.notes = [f"{total:,} keys z-I, the second half of which are of the flipped images"]
            else:
                self._count, self._copies = total, 1
        self._labels = labels[: self._count]

    def __len__(self) -> int:
        return self._count

    def name(self, item: int) -> str:
        """Return the folder and the key."""
        return f"{self._path}, key z-{item}"

    def read(self, item: int) -> Record:
        """Return the moments (1 or 2, 8, h, w), with the flipped image's last, and the label."""
        return self._moments(item), int(self._labels[item])

    def _label(self, item: int, text: bytes) -> int:
        where = f"{self._path}, key y-{item}"
        if not text.isdigit() or len(text) > 20:
            raise ValueError(f"{where} holds no label, but {text[:40]!r}")
        return check_label(int(text), where)

    def _moments(self, item: int) -> NDArray[np.float32]:
        keys = [f"z-{item + copy * self._count}" for copy in range(self._copies)]
        found = []
        for value in self._get(keys):
            side = round((len(value) / 32) ** 0.5)
            if len(value) != 32 * side * side or not side:
                raise ValueError(f"{self.name(item)} holds {len(value):,} bytes, not float32 moments of 4 channels")
            found.append(np.frombuffer(value, np.float32).reshape(8, side, side))
        if len({value.shape for value in found}) > 1:
            raise ValueError(f"{self.name(item)} has another shape than its flipped image")
        return np.stack(found)

    def _second_half_is_flipped(self) -> bool:
        """Return whether records of the second half correlate with their flipped partners, more than with others."""
        items = np.unique(np.linspace(0, self._count - 1, 16).astype(int)).tolist()
        records = [self._moments(item)[:, :4] for item in items]
        if len({record.shape for record in records}) > 1:
            return False
        pairs = np.stack(records)
        pairs -= pairs.mean((3, 4), keepdims=True)
        pairs /= np.maximum(np.sqrt((pairs**2).sum((2, 3, 4), keepdims=True)), 1e-30)
        images, flipped = pairs[:, 0, ..., ::-1], pairs[:, 1]
        partners = float((images * flipped).sum((1, 2, 3)).mean())
        others = float((images * np.roll(flipped, 1, 0)).sum((1, 2, 3)).mean()) if len(items) > 1 else 0.0
        return partners > (1 + others) / 2

    def _total(self) -> int:
        """Return the number of records; a ValueError if the file cannot hold that many."""
        lmdb = self._module()
        text = self._get(["length"])[0]
        if not text.isdigit() or len(text) > 20:
            raise ValueError(f"{self._path}: the key length holds no number, but {text[:40]!r}")
        total = int(text)
        try:
            with self._opened(lmdb) as opened:
                entries = opened.stat()["entries"]
        except lmdb.Error as error:
            raise self._damaged(error) from error
        # The number of entries comes from the file too and is not trusted: each takes at least 16 bytes.
        entries = min(entries, (self._path / "data.mdb").stat().st_size // 16)
        if 2 * total > entries:
            raise ValueError(
                f"{self._path}: the key length says {total:,} records, and there are {entries:,} keys in all"
            )
        return total

    def _label_texts(self, total: int) -> Iterator[bytes]:
        for first in range(0, total, 4096):
            yield from self._get([f"y-{item}" for item in range(first, min(total, first + 4096))])

    def _get(self, keys: list[str]) -> list[bytes]:
        lmdb = self._module()
        try:
            # Opened for each read: an open LMDB must not be inherited by a forked worker.
            with self._opened(lmdb) as opened, opened.begin() as transaction:
                values = [transaction.get(key.encode()) for key in keys]
        except lmdb.Error as error:
            raise self._damaged(error) from error
        for key, value in zip(keys, values, strict=True):
            if value is None:
                raise ValueError(f"{self._path} has no key {key}")
        return values

    def _opened(self, lmdb: Any) -> Any:
        """Open the LMDB after checking its length: reading pages beyond the end would kill the process (SIGBUS)."""
        file = self._path / "data.mdb"
        if not file.is_file():
            raise ValueError(f"{file} is not a regular file")
        opened = lmdb.open(str(self._path), readonly=True, lock=False, readahead=False)
        there, whole = os.stat(file).st_size, (opened.info()["last_pgno"] + 1) * opened.stat()["psize"]
        if there < whole:
            opened.close()
            raise ValueError(f"{file} is cut off: it has {there:,} of {whole:,} bytes; copy it again")
        return opened

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"{self._path} cannot be read as LMDB: {error}")

    @staticmethod
    def _module() -> Any:
        try:
            return importlib.import_module("lmdb")
        except ModuleNotFoundError as error:
            raise ValueError("reading LMDB needs lmdb: pip install lmdb") from error


class LatentTars(_MaskDiT):
    """WebDataset tars of `.latent` (a pickled array of moments, (8, h, w)) and `.cls`, as `Latents`."""

    kind = "maskdit-webdataset"

    def __init__(self, tars: list[Path]) -> None:
        self._tars = WebDataset(tars, suffixes=frozenset({".latent"}))
        self.notes = [f"{len(tars)} tars, pickled arrays"]

    def name(self, item: int) -> str:
        """Return the tar's path and the member's name."""
        return self._tars.name(item)

    def __len__(self) -> int:
        return len(self._tars)

    def read(self, item: int) -> Record:
        """Return the moments (1, 8, h, w) and the label."""
        content, label = self._tars.read(item)
        try:
            values = unpickle_array(content)
        except ValueError as error:
            raise ValueError(f"{self.name(item)} is not a pickled array: {error}") from error
        return check_latent(values, self.name(item), even=True)[None], check_label(label, self.name(item))


def latent_tars(path: Path) -> list[Path]:
    """Return the tars of `.latent` files at a path or directly below it; empty if they hold anything else."""
    tars = [path] if path.suffix == ".tar" else sorted(path.glob("*.tar")) if path.is_dir() else []
    return tars if tars and WebDataset.first_suffixes(tars[0]) & {".latent"} else []
