"""Arrays and labels from an `.npz` file, checked."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


def read_npz(path: Path, num_classes: int | None) -> Arrays:
    """Return `images` or `moments` of a file, and `labels` as int64 with `num_classes` (both absent: no labels).

    Args:
        path: the file.
        num_classes: labels must be below it; None takes one more than the highest label.

    Raises:
        ValueError: a file that cannot be read, or arrays that do not fit one another.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("images", "moments", "labels") if name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an .npz of plain arrays: {error}") from error
    values = [arrays[name] for name in ("images", "moments") if name in arrays]
    if len(values) != 1:
        raise ValueError(f"{path} must hold either `images` or `moments`")
    if not values[0].ndim or not len(values[0]):
        raise ValueError(f"{path} holds no samples")
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
    bad = labels[(labels < 0) | (labels >= (np.inf if num_classes is None else num_classes))]
    if len(bad):
        raise ValueError(f"{path}: label {bad[0]} is outside 0 .. {(num_classes or labels.max() + 1) - 1}")
    return labels.astype(np.int64)
