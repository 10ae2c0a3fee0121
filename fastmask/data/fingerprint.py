"""Fingerprints of datasets: hashes of the content, independent of its path.

They are cheap enough to compare at every start: they hash checksums where there are any, otherwise the names and sizes
of the files and an evenly spaced sample of their contents.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

_SAMPLED = 64
_DIGITS = 32  # hexadecimal
_END = 1 << 16  # bytes


def fingerprint_of(parts: Iterable[object]) -> str:
    """Return a fingerprint of values: of bytes and arrays by content, of other values by their string form."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            part = f"{part.dtype} {part.shape} ".encode() + np.ascontiguousarray(part).tobytes()
        content = part if isinstance(part, bytes) else str(part).encode(errors="surrogateescape")
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:_DIGITS]


def of_arrays(values: NDArray[Any], labels: NDArray[Any], *others: object) -> str:
    """Return the fingerprint of an array (N, ...), from a sample of its rows and all labels (N,)."""
    return fingerprint_of([values.dtype, values.shape, values[sampled(len(values))], labels, *others])


def of_weights(module: nn.Module) -> str:
    """Return the SHA-256 of a module's weights on the CPU: names in sorted order, each with its values in float32."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().contiguous().numpy().data)
    return digest.hexdigest()


def sampled(count: int) -> NDArray[np.int64]:
    """Return up to 64 evenly spaced indices below a count, including the first and the last."""
    found: NDArray[np.int64] = np.unique(np.linspace(0, count - 1, min(count, _SAMPLED)).round().astype(np.int64))
    return found


def of_files(names: Sequence[str], sizes: Sequence[int], labels: Sequence[int], read: Callable[[int], object]) -> str:
    """Return the fingerprint of files in the order of their items.

    Args:
        names: paths relative to the folder or archive.
        sizes: sizes in bytes.
        labels: labels of the files, as far as they are known without reading.
        read: returns the content of an item, or content and label; an OSError or ValueError if it is damaged.
    """
    listed = "\0".join(f"{name}\0{size}" for name, size in zip(names, sizes, strict=True))
    contents = [_content(read, item) for item in sampled(len(names)).tolist()]
    return fingerprint_of([listed, np.array(labels, np.int64), *contents])


def of_tables(files: Sequence[Path], rows: Sequence[int]) -> str:
    """Return the fingerprint of tables, from row counts, file sizes, and both ends of each file.

    Parquet keeps the statistics of its columns at the end.
    """
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
