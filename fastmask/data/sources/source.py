"""What a source of images is: images by number, their labels, and what is said of it when it is opened."""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from fastmask.console import printable
from fastmask.data.sources.labels import WITHOUT
from fastmask.data.store.manifest import MAX_CLASSES

Content = bytes | NDArray[np.uint8]

# Of an image's file. A sparse file or a tar's header can claim any length, which would be allocated.
MAX_BYTES = 2**30
_SHOWN = 3  # names in a line


class Source(ABC):
    """Images by number.

    Attributes:
        kind: what it is, for the manifest.
        channels: 3, or 1 for grey ones.
        side: short side of the images in pixels where all have one, else 0.
        labelled: whether its labels are wanted.
        labels: of the images, int32, -1 where one has none; None if none has.
        class_names: of the labels.
        labelled_by: where the labels were found.
        left_out: names that are no part of it, by the reason.
        notes: lines on whatever else whoever names the source should know.
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
        """Return where an image is, for messages."""

    @abstractmethod
    def content(self, item: int) -> Content:
        """Return an image file's content, or pixels (H, W, C); an OSError or ValueError if it cannot be read."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return what tells these images and labels from others, wherever they lie; see `fastmask.data.fingerprint`."""

    def read(self, item: int) -> tuple[Content, int]:
        """Return an image as `content` does, and its label as `label` does."""
        return self.content(item), self.label(item)

    def label(self, item: int) -> int:
        """Return the label of an image, 0 if none has one; a ValueError if others have."""
        label = 0 if self.labels is None else int(self.labels[item])
        if label < 0:
            raise ValueError(f"{self.name(item)} has no label, as others have ({WITHOUT})")
        return label

    def known_labels(self) -> list[int]:
        """Return the labels of all images, -1 where one has none; empty if none has."""
        return [] if self.labels is None else self.labels.tolist()

    def names_of(self, num_classes: int | None) -> list[str]:
        """Return the names of so many classes, those of the source for None; a ValueError if it has more, or none."""
        there = len(self.class_names)
        if num_classes is None:
            return list(self.class_names)
        if num_classes and not there:
            raise ValueError(
                f"{self.name(0)} and the others have no labels, which num_classes {num_classes} asks for ({WITHOUT})"
            )
        if num_classes and there > num_classes:
            raise ValueError(f"the images have {there} classes, more than num_classes {num_classes}")
        if num_classes > MAX_CLASSES:
            raise ValueError(f"num_classes must be at most {MAX_CLASSES}, not {num_classes}")
        return [*self.class_names[:num_classes], *map(str, range(there, num_classes))]

    def leave_out(self, reason: str, name: str) -> None:
        """Record a name that is no part of the source."""
        self.left_out.setdefault(reason, []).append(name)

    def lines(self) -> list[str]:
        """Return what was recognised and what was left out, for whoever opened the source."""
        count = len(self.class_names)
        line = f"{self.kind}, {len(self):,} images, {f'{count:,}' if count else 'no'} class{'es' * (count != 1)}"
        if count:
            line += f" by {self.labelled_by}: {some(self.class_names, last=True)}"
        elif not self.labelled:
            line += ", as --num-classes 0 asks"
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
        """Return a line for each reason why names were left out."""
        return [f"left out, {reason}: {len(names):,} ({some(names)})" for reason, names in self.left_out.items()]


def some(names: list[str], *, last: bool = False) -> str:
    """Return the first few of some names, and perhaps the last one, for a line."""
    shown = [printable(name) for name in names[:_SHOWN]]
    if len(names) > _SHOWN + last:
        shown.append("...")
    if last and len(names) > _SHOWN:
        shown.append(printable(names[-1]))
    return ", ".join(shown)
