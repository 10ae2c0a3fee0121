"""What a store is prepared from: images of a folder, an archive, a table or an array, each with its label."""

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastmask.data.archives import ImageNetTar, WebDataset
from fastmask.data.fingerprint import of_arrays, of_files, size_of
from fastmask.data.images import SUFFIXES
from fastmask.data.npz import read_npz
from fastmask.data.tables import Table

_SPLIT = re.compile(r"(.+)-\d+-of-\d+(?:-[0-9a-f]+)?\.parquet")

Content = bytes | NDArray[np.uint8]


class Source(Protocol):
    """Images by number.

    Attributes:
        kind: what it is, for the manifest.
        channels: 3, or 1 for grey ones.
        class_names: of the labels, as far as they are known; without any, labels of 0 mean that there are none.
        ignored: names of files that are no images by their suffix.
    """

    kind: str
    channels: int
    class_names: list[str]
    ignored: list[str]

    def __len__(self) -> int: ...

    def name(self, item: int) -> str:
        """Return where an image is, for messages."""
        ...

    def count_classes(self) -> int:
        """Return the number of classes, 0 without labels; may read every label."""
        ...

    def read(self, item: int) -> tuple[Content, int]:
        """Return an image file's content, or pixels (H, W, C), and the label; an OSError or ValueError if damaged."""
        ...

    def fingerprint(self) -> str:
        """Return what tells these images and labels from others, wherever they lie; see `fastmask.data.fingerprint`."""
        ...


def open_source(path: Path) -> Source:
    """Return the source that a path names, told by what is there.

    Raises:
        ValueError: nothing there, or nothing that is known.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist: name a folder, .tar, .parquet, IDX or .npz file of images")
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".tar":
        return ImageNetTar([path]) if ImageNetTar.fits(path) else WebDataset([path])
    if path.suffix in (".parquet", ".arrow"):
        return Table([path])
    if path.suffix == ".npz":
        return _npz(path)
    if "idx" in path.name:
        return _idx(path)
    raise ValueError(f"{path} is no folder, .tar, .parquet, .arrow, IDX or .npz file of images")


def _open_folder(path: Path) -> Source:
    names = sorted(entry.name for entry in path.iterdir())
    tars = [path / name for name in names if name.endswith(".tar")]
    if tars:
        return ImageNetTar(tars) if all(ImageNetTar.is_class(tar) for tar in tars) else WebDataset(tars)
    if "dataset_dict.json" in names:
        splits = [name for name in names if (path / name).is_dir()]
        raise ValueError(f"{path} holds several splits: name one of them, {path / splits[0] if splits else path}")
    if "state.json" in names:
        files = json.loads((path / "state.json").read_text())["_data_files"]
        return Table([path / file["filename"] for file in files])
    parquet = [path / name for name in names if name.endswith(".parquet")]
    if parquet:
        parts = sorted({found[1] for file in parquet if (found := _SPLIT.fullmatch(file.name))})
        if len(parts) > 1:
            raise ValueError(
                f"{path} holds several splits ({', '.join(parts)}): put the files of one, or links to them, into a "
                f"folder of its own"
            )
        return Table(parquet)
    idx = [name for name in names if "images-idx" in name]
    if len(idx) > 1:
        raise ValueError(f"{path} holds several files of images: name one of them, {path / idx[0]}")
    return _idx(path / idx[0]) if idx else Folder(path)


class Folder:
    """A folder of images: a sub-folder per class, labels in `labels.json`, or no labels.

    `labels.json` is {"FILE": LABEL, ...}, or {"labels": [["FILE", LABEL], ...]}, with files named from the folder and
    labels that are numbers or names; or {"SUBFOLDER": "NAME", ...}, which names the classes of the sub-folders.
    """

    kind = "folder"
    channels = 3

    def __init__(self, path: Path) -> None:
        self._path = path
        self.ignored: list[str] = []
        self._files: list[str] = []
        below = len(os.path.join(path, ""))
        for file in _files_below(str(path)):
            is_image = os.path.splitext(file)[1].lower() in SUFFIXES
            (self._files if is_image else self.ignored).append(file[below:])
        labels = path / "labels.json"
        if labels.exists():
            self.ignored.remove("labels.json")
        if not self._files:
            raise ValueError(f"{path} holds no images: expected {path}/CLASS/IMAGE.png (or .jpg, .webp, ...)")
        folders = sorted({file.split("/")[0] for file in self._files if "/" in file})
        loose = [file for file in self._files if "/" not in file]
        given = _read_labels(labels) if labels.exists() else {}
        if given and not set(given) <= set(folders):
            self._label_by_file(labels, given)
            return
        if loose and folders:
            raise ValueError(f"{path} holds images beside its class folders ({loose[0]}): move them into one")
        number = {folder: label for label, folder in enumerate(folders)}
        self._labels = [number.get(file.split("/")[0], 0) for file in self._files]
        self.class_names = [str(given.get(folder, folder)) for folder in folders]

    def __len__(self) -> int:
        return len(self._files)

    def name(self, item: int) -> str:
        """Return the path of a file."""
        return str(self._path / self._files[item])

    def count_classes(self) -> int:
        """Return the number of classes, 0 without labels."""
        return len(self.class_names)

    def read(self, item: int) -> tuple[Content, int]:
        """Return the content of a file and its label."""
        return (self._path / self._files[item]).read_bytes(), self._labels[item]

    def fingerprint(self) -> str:
        """Return what tells these files and labels from others."""
        sizes = [size_of(os.path.join(self._path, file)) for file in self._files]
        return of_files(self._files, sizes, self._labels, self.read)

    def _label_by_file(self, path: Path, given: dict[str, int | str]) -> None:
        absent = [file for file in self._files if file not in given]
        if absent:
            raise ValueError(f"{path} has no label for {absent[0]}, and for {len(absent)} of {len(self._files)} images")
        labels = [given[file] for file in self._files]
        self.class_names = sorted({label for label in labels if isinstance(label, str)})
        number = {name: i for i, name in enumerate(self.class_names)}
        self._labels = [number[label] if isinstance(label, str) else label for label in labels]
        if self.class_names and any(isinstance(label, int) for label in labels):
            raise ValueError(f"{path} mixes labels that are names with labels that are numbers")
        if min(self._labels) < 0:
            raise ValueError(f"{path}: label {min(self._labels)} is below 0")
        self.class_names = self.class_names or [str(label) for label in range(max(self._labels) + 1)]


class Array:
    """Images that are in memory, uint8 (N, H, W, C), of a file."""

    def __init__(self, kind: str, path: Path, images: NDArray[np.uint8], labels: NDArray[Any] | None) -> None:
        self.kind, self._path, self._images = kind, path, images
        self.ignored: list[str] = []
        self._labels = np.zeros(len(images), np.int64) if labels is None else labels
        self.channels = images.shape[3]
        self.class_names = [] if labels is None else [str(label) for label in range(int(labels.max()) + 1)]

    def __len__(self) -> int:
        return len(self._images)

    def name(self, item: int) -> str:
        """Return the file, and which of its images it is."""
        return f"{self._path}, image {item}"

    def count_classes(self) -> int:
        """Return the number of classes, 0 without labels."""
        return len(self.class_names)

    def read(self, item: int) -> tuple[Content, int]:
        """Return the pixels of an image and its label."""
        return self._images[item], int(self._labels[item])

    def fingerprint(self) -> str:
        """Return what tells these images and labels from others."""
        return of_arrays(self._images, self._labels.astype(np.int64))


def _npz(path: Path) -> Array:
    arrays = read_npz(path, None)
    if "moments" in arrays:
        raise ValueError(f"{path} holds moments of latents, which are trained on as they are: --data {path}")
    images = arrays["images"]
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        raise ValueError(f"{path}: `images` must be uint8 (N, H, W, 3), (N, H, W, 1) or (N, H, W)")
    return Array("npz", path, images, arrays.get("labels"))


def _idx(path: Path) -> Array:
    """Return the images of an IDX file, MNIST's format, and the labels of the file beside it."""
    images = _read_idx(path)
    if images.ndim not in (3, 4) or not images.size or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise ValueError(f"{path} holds no images: its shape is {images.shape}")
    beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1"))
    labels = _read_idx(beside) if beside != path and beside.exists() else None
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"{beside} has {labels.shape} labels, {path} has {len(images)} images")
    return Array("idx", path, images if images.ndim == 4 else images[..., None], labels)


def _read_idx(path: Path) -> NDArray[np.uint8]:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of bytes")
    dimensions = content[3]
    shape = tuple(np.frombuffer(content[4 : 4 + 4 * dimensions], ">u4").tolist())
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if len(shape) != dimensions or values.size != np.prod(shape):
        raise ValueError(f"{path} is cut off, or not an IDX file: {values.size:,} values of shape {shape}")
    return values.reshape(shape)


def _read_labels(path: Path) -> dict[str, int | str]:
    try:
        given = json.loads(path.read_text())
        labels = dict(given["labels"] if isinstance(given.get("labels"), list) else given)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    for file, label in labels.items():
        if not isinstance(label, int | str) or isinstance(label, bool):
            raise ValueError(f"{path}: the label of {file} must be a number or a name, not {label!r}")
    return labels


def _files_below(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the files of a folder and those below it in order, through symbolic links too; a loop is a ValueError."""
    real = os.path.realpath(folder)
    if real in above:
        raise ValueError(f"{folder} is a symbolic link to a folder that holds it: remove the link")
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        # Of a link that leads nowhere `entry.is_dir` is an error.
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            yield from _files_below(entry.path, (*above, real))
        else:
            yield entry.path
