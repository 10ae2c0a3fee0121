"""`--on-bad skip`: replaces images that cannot be read."""

import numpy as np

from fastmask.console import say_from_any_rank
from fastmask.data.images.reader import Part, ReadItem, read_part
from fastmask.data.order import following

Bad = list[tuple[int, str]]  # number and error line of each damaged item

MOST = 0.1  # maximum fraction of damaged images
LEAST = 100  # images read before that is checked
_OTHERS = 16  # replacements that are tried for an image


def read_or_replace(read: ReadItem, items: list[int], *, seed: int, size: int) -> Part:
    """Read some items, and replace each damaged one by another item.

    The replacement is the next intact item in a seeded order: a function of the seed and the item alone, independent of
    rank, time and batch.

    Args:
        read: returns an item's value and its label; an OSError or ValueError if it is damaged.
        items: item numbers.
        seed: seed of the order of replacements.
        size: number of items in the source.

    Returns:
        The requested number of items, in order, and the damaged items that were met.

    Raises:
        ValueError: no replacement was found for an item.
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
    """Counts images that could not be read, reports each once, and fails when there are too many.

    Attributes:
        count: number of failed reads; a damaged image counts at each visit.
    """

    def __init__(self) -> None:
        self.count = self._read = 0
        self._read_before = self._bad_before = 0
        self._named: set[int] = set()
        self._last = ""

    def resume(self, read: int, bad: int) -> None:
        """Count the images that a resumed run read before in the fraction of damaged ones."""
        self._read_before, self._bad_before = read, bad

    def add(self, whole: int, bad: Bad) -> None:
        """Record a batch.

        Args:
            whole: number of images that could be read.
            bad: the images that could not.

        Raises:
            ValueError: the fraction of damaged images so far is above `MOST`.
        """
        for item, line in bad:
            if item not in self._named:
                say_from_any_rank(f"left out, and another image taken in its place: {line}")
                self._named.add(item)
            self._last = line
        self.count += len(bad)
        self._read += whole + len(bad)
        read, damaged = self._read_before + self._read, self._bad_before + self.count
        if read >= LEAST and damaged > MOST * read:
            raise ValueError(
                f"{damaged:,} of the {read:,} images that were read are damaged, which is more than "
                f"{MOST:.0%}: --on-bad skip is for a few; the last one: {self._last}"
            )
