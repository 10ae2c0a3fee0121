"""Fingerprints of datasets: the same content has the same one wherever it lies, other content has another.

They are cheap, so that every start can compare them: what has checksums is told by those, files by their names and
sizes, and of contents a sample is read, evenly spread.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SAMPLED = 64
_DIGITS = 32  # hexadecimal
_END = 1 << 16  # bytes


def fingerprint_of(parts: Iterable[object]) -> str:
    """Return a fingerprint of some values, by what they print as; bytes and arrays by what they hold."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            part = f"{part.dtype} {part.shape} ".encode() + np.ascontiguousarray(part).tobytes()
        content = part if isinstance(part, bytes) else str(part).encode(errors="surrogateescape")
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:_DIGITS]


def of_arrays(values: NDArray[Any], labels: NDArray[Any], *others: object) -> str:
    """Return the fingerprint of values (N, ...) in memory, by a sample of them, and of all their labels (N,)."""
    return fingerprint_of([values.dtype, values.shape, values[sampled(len(values))], labels, *others])


def sampled(count: int) -> NDArray[np.int64]:
    """Return numbers below a count, evenly spread, the first and the last one among them."""
    found: NDArray[np.int64] = np.unique(np.linspace(0, count - 1, min(count, _SAMPLED)).round().astype(np.int64))
    return found


def of_files(names: Sequence[str], sizes: Sequence[int], labels: Sequence[int], read: Callable[[int], object]) -> str:
    """Return the fingerprint of files in the order of their items.

    Args:
        names: from the folder or archive that holds them.
        sizes: in bytes.
        labels: of the files, as far as they are known without reading.
        read: returns the content of an item, perhaps with its label; an OSError or ValueError if it is damaged.
    """
    listed = "\0".join(f"{name}\0{size}" for name, size in zip(names, sizes, strict=True))
    contents = [_content(read, item) for item in sampled(len(names)).tolist()]
    return fingerprint_of([listed, np.array(labels, np.int64), *contents])


def of_tables(files: Sequence[Path], rows: Sequence[int]) -> str:
    """Return the fingerprint of tables: their rows, lengths and ends, where parquet keeps statistics of its columns."""
    parts: list[object] = [list(rows)]
    for path in files:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            parts += [size, file.read(_END), file.seek(max(0, size - _END)), file.read(_END)]
    return fingerprint_of(parts)


def size_of(path: str) -> int:
    """Return the length of a file, -1 if there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _content(read: Callable[[int], object], item: int) -> object:
    try:
        found = read(item)
    except (OSError, ValueError):
        return "cannot be read"
    parts = found if isinstance(found, tuple) else (found,)
    return fingerprint_of(parts)
