"""Images that cannot be read, and others that are trained on in their place: `--on-bad skip`."""

import numpy as np

from fastmask.console import say_from_any_rank
from fastmask.data.images.reader import Part, ReadItem, read_part
from fastmask.data.order import following

Bad = list[tuple[int, str]]  # number of each item that was damaged, and a line that says what is wrong

MOST = 0.1  # share of damaged images, once there are
LEAST = 100  # images that were read
_OTHERS = 16  # that are tried in the place of one


def read_or_replace(read: ReadItem, items: list[int], *, seed: int, size: int) -> Part:
    """Return what is read of some items, with another one in the place of each that is damaged.

    It is the next whole one in an order of the seed's own: a function of the seed and the item, whoever reads it, when,
    and with whatever else.

    Args:
        read: returns an item's value and its label; an OSError or ValueError if it is damaged.
        items: their numbers.
        seed: of that order.
        size: how many items there are.

    Returns:
        As many items as were asked for, in their order, and what was damaged on the way.

    Raises:
        ValueError: none was found for an item.
    """
    found, bad = [], []
    for asked in items:
        item, others = asked, min(_OTHERS, size - 1)
        for _ in range(1 + others):
            one = read_part(read, [item])
            if one.items:
                break
            bad += one.bad
            item = following(seed, item, size)
        else:
            first = bad[-1 - others][1]
            raise ValueError(f"{first}; nor can any of the {others} images that --on-bad skip tried in its place")
        found.append(one)
    labels = np.array([one.labels[0] for one in found], np.int64)
    return Part([one.items[0] for one in found], [one.values[0] for one in found], labels, bad)


class BadImages:
    """Takes down which images could not be read, names each once, and tells when they are too many.

    Attributes:
        count: how often an image could not be read; one that is damaged counts at each visit.
    """

    def __init__(self) -> None:
        self.count = self._read = 0
        self._named: set[int] = set()
        self._last = ""

    def add(self, whole: int, bad: Bad) -> None:
        """Take down a batch.

        Args:
            whole: how many images of it could be read.
            bad: those that could not.

        Raises:
            ValueError: of all that were taken down too many are damaged.
        """
        for item, line in bad:
            if item not in self._named:
                say_from_any_rank(f"left out, and another image taken in its place: {line}")
                self._named.add(item)
            self._last = line
        self.count += len(bad)
        self._read += whole + len(bad)
        if self._read >= LEAST and self.count > MOST * self._read:
            raise ValueError(
                f"{self.count:,} of the {self._read:,} images that were read are damaged, which is more than "
                f"{MOST:.0%}: --on-bad skip is for a few; the last one: {self._last}"
            )
