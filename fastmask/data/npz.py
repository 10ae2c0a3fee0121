"""Arrays and labels from an `.npz` file, checked."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


def read_npz(path: Path, num_classes: int | None) -> Arrays:
    """Return `images` or `moments` of a file, and `labels` as int64 with `num_classes` (both absent: no labels).

    Args:
        path: the file.
        num_classes: labels must be below it; None takes one more than the highest label, 0 leaves them out.

    Raises:
        ValueError: a file that cannot be read, or arrays that do not fit one another.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an .npz file, or is cut off: write it with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("images", "moments", "labels") if name in file.files}
    # An encrypted member is a RuntimeError, an unknown compression a NotImplementedError, which is one too.
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as an .npz of plain arrays: {error}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{path}: `{name}` is not a numpy array: write the file with numpy.savez")
    values = [arrays[name] for name in ("images", "moments") if name in arrays]
    if len(values) != 1:
        raise ValueError(f"{path} must hold either `images` or `moments`")
    if not values[0].ndim or not len(values[0]):
        raise ValueError(f"{path} holds no samples")
    if num_classes == 0:
        arrays.pop("labels", None)
    if "labels" in arrays:
        arrays["labels"] = _checked_labels(path, arrays["labels"], len(values[0]), num_classes)
        arrays["num_classes"] = np.array(arrays["labels"].max() + 1 if num_classes is None else num_classes)
    elif num_classes:
        raise ValueError(f"{path} holds no `labels`, which num_classes {num_classes} asks for")
    return arrays


def _checked_labels(path: Path, labels: NDArray[Any], count: int, num_classes: int | None) -> NDArray[np.int64]:
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{path}: `labels` must be {count} integers, not {labels.dtype} of shape {tuple(labels.shape)}"
        )
    highest = np.iinfo(np.int32).max if num_classes is None else num_classes - 1
    bad = labels[(labels < 0) | (labels > highest)]
    if len(bad):
        raise ValueError(f"{path}: label {bad[0]} is outside 0 .. {highest}")
    return labels.astype(np.int64)
