"""Latents that other projects have extracted, to be taken over into a store: MaskDiT's, fast-DiT's and EDM2's."""

import functools
import importlib
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fastmask.data.archives import WebDataset
from fastmask.data.latents import SCALE

Record = tuple[NDArray[Any], int]

# EDM2's assumptions of the raw latents (arXiv 2312.02696, its released encoder), which it brings to a deviation of 0.5.
_EDM2_MEAN = [5.81, 3.25, 0.12, -2.15]
_EDM2_STD = [4.17, 4.62, 3.71, 3.28]


class Latents(Protocol):
    """Latents by number.

    Attributes:
        kind: what they are, for the manifest.
        holds: "moments", means before log-variances, or "latents", drawn once and for all.
        vae: what encoded them.
        scale: they are trained on as (latent - shift) * scale, for all channels or for each.
        shift: see scale.
    """

    kind: str
    holds: Literal["moments", "latents"]
    vae: str
    scale: float | list[float]
    shift: float | list[float]

    def __len__(self) -> int: ...

    def name(self, item: int) -> str:
        """Return where a record is, for messages."""
        ...

    def read(self, item: int) -> Record:
        """Return a record (copies, channels, height, width) and its label; an OSError or ValueError if damaged."""
        ...


def open_latents(path: Path) -> Latents | None:
    """Return the latents that a path names, None if there are none of a known layout.

    Raises:
        ValueError: a known layout that is damaged.
    """
    if (path / "data.mdb").exists():
        return _Lmdb(path)
    if tars := _latent_tars(path):
        return _LatentTars(tars)
    if folders := _feature_folders(path):
        return _Features(*folders)
    return _Edm2(path) if _is_edm2(path) else None


class _MaskDiT:
    holds: Literal["moments", "latents"] = "moments"
    vae = "Stable Diffusion KL-f8, MaskDiT's autoencoder_kl.pth"
    scale: float | list[float] = SCALE
    shift: float | list[float] = 0.0


class _Lmdb(_MaskDiT):
    """Keys `z-I` with float32 moments, `y-I` with the label in digits, and `length`.

    With mirror images there are as many again, in the same order: the labels repeat, and the moments look mirrored.
    """

    kind = "maskdit-lmdb"

    def __init__(self, path: Path) -> None:
        self._path = path
        total = int(self._get(["length"])[0])
        labels = [int(label) for label in self._get([f"y-{i}" for i in range(total)])]
        half = total // 2
        self._count, self._copies = total, 1
        if total > 1 and total % 2 == 0 and labels[:half] == labels[half:]:
            self._count, self._copies = half, 2
            if not self._second_half_is_mirrored():
                self._count, self._copies = total, 1
        self._labels = labels[: self._count]

    def __len__(self) -> int:
        return self._count

    def name(self, item: int) -> str:
        return f"{self._path}, key z-{item}"

    def read(self, item: int) -> Record:
        return self._moments(item), self._labels[item]

    def _moments(self, item: int) -> NDArray[np.float32]:
        keys = [f"z-{item + copy * self._count}" for copy in range(self._copies)]
        values = np.stack([np.frombuffer(value, np.float32) for value in self._get(keys)])
        side = round((values.shape[1] / 8) ** 0.5)
        if values.shape[1] != 8 * side * side:
            raise ValueError(f"{self.name(item)} holds {values.shape[1]} values, not moments of 4 channels")
        return values.reshape(-1, 8, side, side)

    def _second_half_is_mirrored(self) -> bool:
        """Return whether records of the second half are more like their mirrored partners than like those of others."""
        items = np.unique(np.linspace(0, self._count - 1, 16).astype(int)).tolist()
        pairs = np.stack([self._moments(item)[:, :4] for item in items])
        pairs -= pairs.mean((3, 4), keepdims=True)
        pairs /= np.maximum(np.sqrt((pairs**2).sum((2, 3, 4), keepdims=True)), 1e-30)
        images, mirrored = pairs[:, 0, ..., ::-1], pairs[:, 1]
        partners = float((images * mirrored).sum((1, 2, 3)).mean())
        others = float((images * np.roll(mirrored, 1, 0)).sum((1, 2, 3)).mean()) if len(items) > 1 else 0.0
        return partners > (1 + others) / 2

    def _get(self, keys: list[str]) -> list[bytes]:
        try:
            lmdb = importlib.import_module("lmdb")
        except ModuleNotFoundError as error:
            raise ValueError("reading LMDB needs lmdb: pip install lmdb") from error
        try:
            # Opened for each read: an open one must not come along into a worker.
            opened = lmdb.open(str(self._path), readonly=True, lock=False, readahead=False)
            with opened, opened.begin() as transaction:
                values = [transaction.get(key.encode()) for key in keys]
        except lmdb.Error as error:
            raise ValueError(f"{self._path} cannot be read as LMDB: {error}") from error
        for key, value in zip(keys, values, strict=True):
            if value is None:
                raise ValueError(f"{self._path} has no key {key}")
        return values


class _LatentTars(_MaskDiT):
    """WebDataset tars of `.latent`, a pickled array of moments (8, h, w), and `.cls`."""

    kind = "maskdit-webdataset"

    def __init__(self, tars: list[Path]) -> None:
        self._tars = WebDataset(tars, suffixes=frozenset({".latent"}))

    def name(self, item: int) -> str:
        return self._tars.name(item)

    def __len__(self) -> int:
        return len(self._tars)

    def read(self, item: int) -> Record:
        content, label = self._tars.read(item)
        try:
            values = _Arrays(io.BytesIO(content)).load()
        except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.name(item)} is not a pickled array: {error}") from error
        return _checked(values, self.name(item))[None], label


class _Features:
    """Folders `*_features` and `*_labels` of I.npy: latents (1, 4, h, w), scaled, and labels (1,)."""

    kind = "fast-dit"
    holds: Literal["moments", "latents"] = "latents"
    vae = "stabilityai/sd-vae-ft-ema or -mse, scaled already"
    scale: float | list[float] = 1.0
    shift: float | list[float] = 0.0

    def __init__(self, features: Path, labels: Path) -> None:
        self._features, self._labels = features, labels
        self._count = sum(1 for _ in features.glob("*.npy"))

    def __len__(self) -> int:
        return self._count

    def name(self, item: int) -> str:
        return str(self._features / f"{item}.npy")

    def read(self, item: int) -> Record:
        values = _load(self._features / f"{item}.npy", self.name(item))
        labels = self._labels / f"{item}.npy"
        return _checked(np.squeeze(values, 0), self.name(item))[None], int(_load(labels, str(labels)).item())


class _Edm2:
    """A zip or folder with `dataset.json` and .npy files of means and standard deviations (8, h, w)."""

    kind = "edm2"
    holds: Literal["moments", "latents"] = "moments"
    vae = "stabilityai/sd-vae-ft-mse, of images in [0, 1]"

    def __init__(self, path: Path) -> None:
        self._path = path
        self.scale: float | list[float] = [0.5 / std for std in _EDM2_STD]
        self.shift: float | list[float] = list(_EDM2_MEAN)
        try:
            labels = json.loads(self._content("dataset.json"))["labels"]
            self._files = [(str(name), int(label)) for name, label in labels]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: dataset.json lists no labels ({error})") from error

    def __len__(self) -> int:
        return len(self._files)

    def name(self, item: int) -> str:
        return f"{self._path}:{self._files[item][0]}"

    def read(self, item: int) -> Record:
        name, label = self._files[item]
        values = _checked(_load(io.BytesIO(self._content(name)), self.name(item)), self.name(item))
        mean, std = np.split(values.astype(np.float32), 2)
        return np.concatenate([mean, 2 * np.log(np.maximum(std, 1e-13))])[None], label  # log-variances, from -60

    def _content(self, name: str) -> bytes:
        if self._path.is_dir():
            return (self._path / name).read_bytes()
        try:
            return _zip(self._path, os.getpid()).read(name)
        except (KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self._path}:{name} cannot be read: {error}") from error


@functools.lru_cache(maxsize=1)
def _zip(path: Path, process: int) -> zipfile.ZipFile:
    """Return a file whose list is read once in each process: that of a million images takes seconds."""
    return zipfile.ZipFile(path)


class _Arrays(pickle.Unpickler):
    """Reads pickled numpy arrays, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {"_reconstruct", "_frombuffer", "ndarray", "dtype"}
        if module.split(".")[0] == "numpy" and name in allowed:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def _feature_folders(path: Path) -> tuple[Path, Path] | None:
    """Return the folders of features and of labels, None if they are not there."""
    for features in sorted(path.glob("*_features")) if path.is_dir() else []:
        labels = features.with_name(features.name.replace("_features", "_labels"))
        if labels.is_dir() and (features / "0.npy").exists():
            return features, labels
    return None


def _is_edm2(path: Path) -> bool:
    if path.is_dir():
        return (path / "dataset.json").exists() and next(path.glob("*/*.npy"), None) is not None
    if path.suffix != ".zip" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        names = file.namelist()
    return "dataset.json" in names and any(name.endswith(".npy") for name in names)


def _latent_tars(path: Path) -> list[Path]:
    tars = [path] if path.suffix == ".tar" else sorted(path.glob("*.tar")) if path.is_dir() else []
    return tars if tars and WebDataset.first_suffixes(tars[0]) & {".latent"} else []


def _load(file: Any, name: str) -> NDArray[Any]:
    try:
        values: NDArray[Any] = np.load(file, allow_pickle=False)
    except (EOFError, ValueError) as error:
        raise ValueError(f"{name} cannot be read as an .npy: {error}") from error
    return values


def _checked(values: Any, name: str) -> NDArray[Any]:
    if not isinstance(values, np.ndarray) or values.ndim != 3 or not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"{name} holds no latent, but {getattr(values, 'shape', type(values).__name__)}")
    return values
