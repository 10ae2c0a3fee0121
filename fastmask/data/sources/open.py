"""Opens an image source by path: detects folder, archive, table or array."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from fastmask.console import printable
from fastmask.data.images.pixels import SUFFIXES
from fastmask.data.sources.arrays import open_idx, open_npz
from fastmask.data.sources.folders import SPECIAL, Folder, files_below, is_hidden
from fastmask.data.sources.parquet import Table, open_saved
from fastmask.data.sources.source import Source
from fastmask.data.sources.tar import ImageNetTar, WebDataset
from fastmask.data.sources.zips import Zip

__all__ = ["Source", "open_source"]

_SPLIT = re.compile(r"(.+)-\d+-of-\d+(?:-[0-9a-f]+)?\.parquet")
_KNOWN = ".tar, .zip, .parquet, .arrow, IDX or .npz file of images"


def open_source(path: Path, labelled: bool = True) -> Source:
    """Open the image source at a path, with its format detected from the content.

    Args:
        path: a folder or file.
        labelled: read the labels; otherwise they are not checked either.

    Raises:
        ValueError: the path does not exist, or its format is unknown or ambiguous.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist: name a folder, or a {_KNOWN}")
    if path.is_dir():
        return _open_folder(path, labelled)
    if not path.is_file():
        raise ValueError(f"{path} is a pipe, a socket or a device: name a folder, or a {_KNOWN}")
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return _open_tars([path], ImageNetTar.fits(path), labelled)
    if suffix == ".zip":
        return Zip(path, labelled)
    if suffix in (".parquet", ".arrow"):
        return Table([path], labelled)
    if suffix == ".npz":
        return open_npz(path, labelled)
    if "idx" in path.name:
        return open_idx(path, labelled)
    raise ValueError(f"{path} is no folder, and no {_KNOWN}")


def _open_folder(path: Path, labelled: bool) -> Source:
    entries = sorted(entry for entry in path.iterdir() if not is_hidden(entry.name))
    files = [entry for entry in entries if entry.is_file()]
    names = {file.name for file in files}
    if "dataset_dict.json" in names:
        raise ValueError(f"{path} holds several splits: {_name_one(entry for entry in entries if entry.is_dir())}")
    if "state.json" in names:
        return open_saved(path, labelled)
    kinds = {
        "tars": [file for file in files if file.suffix.lower() == ".tar"],
        "tables": [file for file in files if file.suffix.lower() == ".parquet"],
        "IDX files": [file for file in files if "images-idx" in file.name],
    }
    found = {kind: some for kind, some in kinds.items() if some}
    if not found:
        return Folder(path, labelled)
    (kind, chosen), *others = found.items()
    image = others[0][1][0] if others else next(filter(None, map(_first_image, entries)), None)
    if image:
        raise ValueError(
            f"{path} holds {kind} ({printable(chosen[0].name)}) beside other images ({printable(str(image))}): name "
            f"those that are meant, or move them into a folder of their own"
        )
    source = _open_files(path, kind, chosen, labelled)
    for entry in entries:
        if entry not in chosen and "labels-idx" not in entry.name:
            source.leave_out("beside them" if entry.is_file() or entry.is_dir() else SPECIAL, entry.name)
    return source


def _open_files(path: Path, kind: str, files: list[Path], labelled: bool) -> Source:
    if kind == "tars":
        classes = [tar for tar in files if ImageNetTar.is_class(tar)]
        if classes and len(classes) < len(files):
            other = next(tar for tar in files if tar not in classes)
            raise ValueError(f"{path} holds tars of classes ({classes[0].name}) and another, {other}: move that one")
        return _open_tars(files, bool(classes), labelled)
    if kind == "tables":
        parts = {found[1]: file for file in reversed(files) if (found := _SPLIT.fullmatch(file.name))}
        if len(parts) > 1:
            raise ValueError(
                f"{path} holds several splits ({', '.join(sorted(parts, key=_train_first))}): put the files of one, or "
                f"links to them, into a folder of its own"
            )
        return Table(files, labelled)
    if len(files) > 1:
        raise ValueError(f"{path} holds several files of images: {_name_one(files)}")
    return open_idx(files[0], labelled)


def _open_tars(tars: list[Path], classes: bool, labelled: bool) -> Source:
    return ImageNetTar(tars, labelled) if classes else WebDataset(tars, labelled=labelled, folders=True)


def _first_image(entry: Path) -> Path | None:
    """Return the first image at or below a path, if any."""
    if entry.is_file():
        return entry if entry.suffix.lower() in SUFFIXES else None
    names = (name for name, reason in files_below(entry) if not reason) if entry.is_dir() else ()
    return next((entry / name for name in names if os.path.splitext(name)[1].lower() in SUFFIXES), None)


def _train_first(name: str) -> tuple[bool, str]:
    return not name.startswith("train"), name


def _name_one(paths: Iterable[Path]) -> str:
    """Return the advice to give one of several paths, with the training set first."""
    return f"name one of them, {' or '.join(str(path) for path in sorted(paths, key=lambda p: _train_first(p.name)))}"
