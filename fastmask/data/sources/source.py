"""The base class of image sources: images by number, their labels, and the report on opening."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmask.console import printable
from fastmask.data.sources.labels import WITHOUT
from fastmask.data.store.manifest import MAX_CLASSES

Content = bytes | NDArray[np.uint8]

# Limit for an image file: a sparse file or a tar header can claim any length, which would be allocated.
MAX_BYTES = 2**30
_SHOWN = 3  # names in a message


class Source(ABC):
    """Images by number.

    Attributes:
        kind: name of the format, for the manifest.
        channels: 3, or 1 for greyscale.
        side: short side in pixels if it is the same for all images, else 0.
        labelled: whether labels are requested.
        labels: labels of the images, int32, -1 for a missing one; None if no image has one.
        class_names: names of the classes.
        labelled_by: origin of the labels, for messages.
        left_out: skipped names, by reason.
        notes: further lines to print when the source is opened.
    """

    kind: str
    channels = 3
    side = 0

    def __init__(self, labelled: bool) -> None:
        self.labelled = labelled
        self.labels: NDArray[np.int32] | None = None
        self.class_names: list[str] = []
        self.labelled_by = ""
        self.left_out: dict[str, list[str]] = {}
        self.notes: list[str] = []

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, item: int) -> str:
        """Return the location of an image, for messages."""

    @abstractmethod
    def content(self, item: int) -> Content:
        """Return the content of an image file, or pixels (H, W, C); an OSError or ValueError if it cannot be read."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of the images and labels, independent of their path; see `fastmask.data.fingerprint`."""

    def read(self, item: int) -> tuple[Content, int]:
        """Return `content` and `label` of an image."""
        return self.content(item), self.label(item)

    def label(self, item: int) -> int:
        """Return the label of an image, 0 in a source without labels; a ValueError if only this image has none."""
        label = 0 if self.labels is None else int(self.labels[item])
        if label < 0:
            raise ValueError(f"{self.name(item)} has no label, as others have ({WITHOUT})")
        return label

    def known_labels(self) -> list[int]:
        """Return the labels of all images, -1 for a missing one; empty in a source without labels."""
        return [] if self.labels is None else self.labels.tolist()

    def names_of(self, num_classes: int | None) -> list[str]:
        """Return names for ``num_classes`` classes (None: the source's); a ValueError if it has more, or no labels."""
        there = len(self.class_names)
        if num_classes is None:
            return list(self.class_names)
        if num_classes and not there:
            raise ValueError(
                f"{self.name(0)} and the others have no labels, but num_classes is {num_classes} ({WITHOUT})"
            )
        if num_classes and there > num_classes:
            raise ValueError(f"the images have {there} classes, more than num_classes {num_classes}")
        if num_classes > MAX_CLASSES:
            raise ValueError(f"num_classes must be at most {MAX_CLASSES}, not {num_classes}")
        return [*self.class_names[:num_classes], *map(str, range(there, num_classes))]

    def leave_out(self, reason: str, name: str) -> None:
        """Record a skipped name."""
        self.left_out.setdefault(reason, []).append(name)

    def lines(self) -> list[str]:
        """Return the report for the user: format, classes, notes and skipped files."""
        count = len(self.class_names)
        line = f"{self.kind}, {len(self):,} images, {f'{count:,}' if count else 'no'} class{'es' * (count != 1)}"
        if count:
            line += f" by {self.labelled_by}: {some(self.class_names, last=True)}"
        elif not self.labelled:
            line += " (--num-classes 0)"
        found = [line, *self.notes]
        if self.labels is not None:
            without = int((self.labels < 0).sum())
            if without:
                found.append(f"{without:,} images have no label, as the others have ({WITHOUT})")
            empty = count - len(np.unique(self.labels[self.labels >= 0]))
            if empty:
                found.append(f"{empty:,} of the classes have no image")
        return found + self.left_out_lines()

    def left_out_lines(self) -> list[str]:
        """Return one line per reason for skipped names."""
        return [f"left out, {reason}: {len(names):,} ({some(names)})" for reason, names in self.left_out.items()]


def some(names: list[str], *, last: bool = False) -> str:
    """Format the first few of some names, and optionally the last, for a message."""
    shown = [printable(name) for name in names[:_SHOWN]]
    if len(names) > _SHOWN + last:
        shown.append("...")
    if last and len(names) > _SHOWN:
        shown.append(printable(names[-1]))
    return ", ".join(shown)


def names_sha256(path: str, count: int, name: Callable[[int], str]) -> str:
    """Return the SHA-256 of the names of a source's items, in their order and relative to its path."""
    names, prefix = hashlib.sha256(), printable(path)
    for item in range(count):
        names.update(printable(name(item)).removeprefix(prefix).encode() + b"\n")
    return names.hexdigest()


def labels_sha256(names: list[str], labels: NDArray[Any]) -> str:
    """Return the SHA-256 of the names of a source's classes and its labels."""
    return hashlib.sha256("\n".join(names).encode() + labels.tobytes()).hexdigest()
