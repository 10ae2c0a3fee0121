"""Conversion of labels, given as numbers or names, to class indices."""

import collections
import json
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmask.console import printable
from fastmask.data.store.manifest import MAX_CLASSES

WITHOUT = "--num-classes 0 takes the images without labels"

Label = int | str


def in_order(names: Iterable[str]) -> list[str]:
    """Sort class names: numerically if all of them are numbers, otherwise as text."""
    unique = set(names)
    if all(name.isascii() and name.isdigit() for name in unique):
        return sorted(unique, key=lambda name: (int(name), name))
    return sorted(unique)


def to_numbers(given: Sequence[Label | None], where: str) -> tuple[NDArray[np.int32] | None, list[str]]:
    """Convert labels to int32, with -1 for a missing label, and return them with the class names.

    Args:
        given: label of each image, a number or a class name; None if it has none.
        where: origin of the labels, for messages.

    Returns:
        The labels, None if no image has one, and the class names. A number below 0 is a missing label. Names are
        numbered in the order of `in_order`; numbers become the names of their classes.

    Raises:
        ValueError: names and numbers are mixed, a number is too large for a label, or all are below 0.
    """
    names = {label for label in given if isinstance(label, str)}
    numbers = [label for label in given if isinstance(label, int)]
    if names and numbers:
        raise ValueError(
            f"{where} mixes labels that are names ({printable(min(names))}) with labels that are numbers "
            f"({numbers[0]}): give all of them one form, or {WITHOUT}"
        )
    if names:
        ordered = in_order(names)
        number_of = {name: number for number, name in enumerate(ordered)}
        labels = [number_of[label] if isinstance(label, str) else -1 for label in given]
        return np.array(labels, np.int32), [printable(name) for name in ordered]
    if not numbers:
        return None, []
    check_label(max(numbers), where)
    labels = [label if isinstance(label, int) and label >= 0 else -1 for label in given]
    return np.array(labels, np.int32), [str(number) for number in range(max(numbers) + 1)]


def check_label(label: int, where: str) -> None:
    """Raise a ValueError if a number is not a valid label."""
    if label < 0:
        raise ValueError(
            f"{where}: label {label} is below 0, as in a test split, which comes without its labels: {WITHOUT}"
        )
    if label >= MAX_CLASSES:
        raise ValueError(
            f"{where}: label {label} is above {MAX_CLASSES - 1}, the highest there may be: number the classes from 0, "
            f"or {WITHOUT}"
        )


def parse_label_file(content: bytes, where: str, *, bare: bool) -> dict[str, Label] | None:
    """Parse a `labels.json` or `dataset.json` to a label per file.

    Args:
        content: {"labels": [["FILE", LABEL], ...]}, or {"labels": null}, or {"FILE": LABEL, ...}.
        where: path of the file, for messages.
        bare: accept the last form; otherwise a file without `labels` is unrelated and has no labels.

    Returns:
        The labels; None for {"labels": null}.

    Raises:
        ValueError: the content has another form, a path leads out of the folder, or a file has two labels.
    """
    try:
        given = json.loads(content, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be read: {error} ({WITHOUT})") from error
    if not isinstance(given, dict):
        raise ValueError(f"{where} cannot be read: expected a JSON object with a label for each file ({WITHOUT})")
    listed = given.get("labels", given if bare else [])
    if listed is None:
        return None
    labels = _listed(listed, where) if isinstance(listed, list) else given
    for file, label in labels.items():
        if isinstance(label, float) and label.is_integer():
            labels[file] = label = int(label)
        if not isinstance(label, int | str) or isinstance(label, bool):
            raise ValueError(
                f"{where}: the label of {printable(file)} must be a number or a name, not {reprlib.repr(label)} "
                f"({WITHOUT})"
            )
        if file.startswith("/") or ".." in file.split("/"):
            raise ValueError(f"{where} names {printable(file)}, which leads out of the folder: remove the entry")
    return labels


def label_of_text(text: Any, where: str) -> Label | None:
    """Parse the label of a sample: a number, also in digits, or a class name; None if it is empty."""
    if isinstance(text, str):
        text = text.strip()
        sign = text.startswith(("-", "+"))
        return int(text) if text[sign:].isascii() and text[sign:].isdigit() and len(text) < 20 else text or None
    if isinstance(text, float) and text.is_integer():
        return int(text)
    if text is not None and (not isinstance(text, int) or isinstance(text, bool)):
        raise ValueError(f"{where}: a label must be a number or a name, not {reprlib.repr(text)} ({WITHOUT})")
    return text


def _listed(entries: list[Any], where: str) -> dict[str, Any]:
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise ValueError(f"{where} cannot be read: expected [FILE, LABEL], not {reprlib.repr(entry)} ({WITHOUT})")
    try:
        return _without_duplicates(entries)
    except ValueError as error:
        raise ValueError(f"{where} cannot be read: {error}") from error


def _without_duplicates(pairs: list[Any]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it names {printable(twice)} twice")
    return found
