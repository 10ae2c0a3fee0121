"""Reads `.npz` files safely: headers and sizes are checked first, since a small file can inflate to any size."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmask.console import say
from fastmask.data.foreign.npy import Header, parse_header
from fastmask.data.store.manifest import MAX_CLASSES

Arrays = dict[str, NDArray[Any]]

_NAMES = ("images", "moments", "labels", "scale", "shift")
_ADM = {"arr_0": "images", "arr_1": "labels"}  # names in sample files of ADM's evaluator
_MAX_HEADER_BYTES = 1 << 16
_BLOCK = 1 << 24
# zipfile raises RuntimeError for encryption, and its subclass NotImplementedError for unknown compression.
_DAMAGE = (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error)


def read_npz(path: Path, num_classes: int | None) -> Arrays:
    """Read `images` or `moments` of a file, and `labels` as int64 with `num_classes` (both absent without labels).

    `scale` and `shift` are included if present; other arrays are skipped and reported. Files of ADM's evaluator, with
    `arr_0` for images and `arr_1` for labels, are read as well.

    Args:
        path: path of the file.
        num_classes: labels must be below it; None takes the highest label plus one, 0 omits the labels.

    Raises:
        ValueError: the file cannot be read, does not fit in memory, or its arrays do not match.
    """
    if not path.is_file() or not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an .npz file, or is cut off: write it with numpy.savez")
    try:
        with zipfile.ZipFile(path) as file:
            members = _members(file)
            headers = {name: _header(file, member, path, name in _NAMES) for name, member in members.items()}
            _check_memory(path, [headers[name] for name in _NAMES if name in headers])
            arrays = {name: _values(file, members[name], headers[name]) for name in _NAMES if name in headers}
    except _DAMAGE as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} cannot be read as an .npz of plain arrays: {error}") from error
    values = [arrays[name] for name in ("images", "moments") if name in arrays]
    if len(values) != 1:
        raise ValueError(f"{path} must hold either `images` or `moments`")
    if not values[0].ndim or not len(values[0]):
        raise ValueError(f"{path} holds no samples")
    if num_classes == 0:
        arrays.pop("labels", None)
    elif "labels" in arrays:
        arrays["labels"] = _checked_labels(path, arrays["labels"], len(values[0]), num_classes)
        arrays["num_classes"] = np.array(arrays["labels"].max() + 1 if num_classes is None else num_classes)
    elif num_classes:
        raise ValueError(f"{path} holds no `labels`, but num_classes is {num_classes}")
    _say_left_out(path, headers, len(values[0]), labelled=num_classes == 0 or "labels" in arrays)
    return arrays


def images_refused(path: Path, images: NDArray[Any]) -> str:
    """Return the error message for an array `images` of a wrong type or shape."""
    return (
        f"{path}: `images` must be uint8 of shape (N, H, W, 3), (N, H, W, 1) or (N, H, W), not {images.dtype} of shape "
        f"{tuple(images.shape)}"
    )


def _members(file: zipfile.ZipFile) -> dict[str, str]:
    """Return the names of the arrays as given to `numpy.savez`, by the names of `read_npz`."""
    names = [name.removesuffix(".npy") for name in file.namelist()]
    renamed = (
        {} if {"images", "moments"} & set(names) else {adm: name for adm, name in _ADM.items() if name not in names}
    )
    return {renamed.get(name, name): name for name in names}


def _header(file: zipfile.ZipFile, name: str, path: Path, needed: bool) -> Header | None:
    """Return the header of an array; if it is invalid, None for a member that is not needed, else a ValueError."""
    try:
        with file.open(f"{name}.npy") as member:
            header = parse_header(member.read(_MAX_HEADER_BYTES), f"`{name}`")
        length = file.getinfo(f"{name}.npy").file_size
        if length != header.offset + header.bytes:
            raise ValueError(f"`{name}` has {length:,} bytes, not those of {header.dtype} of shape {header.shape}")
    except (KeyError, *_DAMAGE) as error:
        if not needed:
            return None
        raise ValueError(
            f"{path}: `{name}` is not a numpy array of numbers ({error}): write the file with numpy.savez"
        ) from error
    return header


def _check_memory(path: Path, headers: list[Header | None]) -> None:
    needed, free = sum(header.bytes for header in headers if header), free_memory()
    if free is not None and needed > free:
        raise ValueError(
            f"{path} takes {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free: give it in parts, or "
            f"images as files"
        )


def free_memory() -> int | None:
    """Return the available memory in bytes, None if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def _values(file: zipfile.ZipFile, name: str, header: Header | None) -> NDArray[Any]:
    assert header is not None
    try:
        values = np.empty(header.bytes, np.uint8)
    except MemoryError as error:
        raise ValueError(f"`{name}` takes {header.bytes / 1e9:,.1f} GB of memory, which cannot be had") from error
    with file.open(f"{name}.npy") as member:
        member.read(header.offset)
        place = 0
        while block := member.read(_BLOCK):  # the last read verifies the checksum
            values[place : place + len(block)] = np.frombuffer(block, np.uint8)
            place += len(block)
    typed = values.view(header.dtype) if len(values) else np.empty(0, header.dtype)
    return typed.reshape(header.shape, order="F" if header.fortran else "C")


def _say_left_out(path: Path, headers: dict[str, Header | None], count: int, labelled: bool) -> None:
    """Report unused members; a ValueError if labels are missing and one of them could be the labels."""
    others = {name: header for name, header in headers.items() if name not in _NAMES}
    for name, header in others.items():
        integers = header is not None and header.shape == (count,) and header.dtype.kind in "iu"
        if integers and not labelled:
            raise ValueError(
                f"{path} holds no `labels`, but `{name}`, {count} integers: give them the name `labels`, or give "
                f"--num-classes 0 to train without labels"
            )
    if others:
        say(f"{path}: left out: {', '.join(sorted(others))}")


def _checked_labels(path: Path, labels: NDArray[Any], count: int, num_classes: int | None) -> NDArray[np.int64]:
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{path}: `labels` must be {count} integers, not {labels.dtype} of shape {tuple(labels.shape)}"
        )
    highest = MAX_CLASSES - 1 if num_classes is None else num_classes - 1
    bad = labels[(labels < 0) | (labels > highest)]
    if len(bad):
        raise ValueError(f"{path}: label {bad[0]} is outside 0 .. {highest}")
    return labels.astype(np.int64)
