"""Reads .npy content without trusting it: a header of the plain form, and exactly as many values as it says."""

import math
import re
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_MAGIC = b"\x93NUMPY"
# What numpy writes of an array of numbers. Its own reader evaluates the text as Python, and allocates what that claims.
_HEADER = re.compile(
    rb"\{'descr': '([<>|=])(f[248]|[iu][1248])', 'fortran_order': (True|False), 'shape': \(([0-9, ]*)\), \} *\n?"
)
_MAX_DIGITS = 15  # of a dimension


class Header(NamedTuple):
    """What an .npy says of its values, and where they begin in the file."""

    dtype: np.dtype[Any]
    fortran: bool
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        """Length of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def parse_header(content: bytes, name: str) -> Header:
    """Return the header that an .npy begins with.

    Args:
        content: its first bytes, all of the header among them.
        name: of the file, for messages.

    Raises:
        ValueError: it is not an .npy of numbers.
    """
    if content[:6] != _MAGIC or len(content) < 12 or content[6] not in (1, 2, 3):
        raise ValueError(f"{name} cannot be read as an .npy: it does not begin as one")
    first = 10 if content[6] == 1 else 12
    offset = first + int.from_bytes(content[8:first], "little")
    said = content[first:offset]
    found = _HEADER.fullmatch(said)
    if not found or len(said) < offset - first:
        raise ValueError(f"{name} cannot be read as an .npy of numbers: its header is {said[:80]!r}")
    order, kind, fortran, shape = (part.decode() for part in found.groups())
    sides = [side.strip() for side in shape.split(",") if side.strip()]
    if any(not side.isdigit() or len(side) > _MAX_DIGITS for side in sides):
        raise ValueError(f"{name} cannot be read as an .npy of numbers: its shape is ({shape[:80]})")
    return Header(np.dtype(order + kind), fortran == "True", tuple(map(int, sides)), offset)


def parse_npy(content: bytes, name: str) -> NDArray[Any]:
    """Return the array of an .npy's content; a ValueError if its values are not as many as its header says."""
    header = parse_header(content, name)
    if header.bytes != len(content) - header.offset:
        raise ValueError(
            f"{name} cannot be read as an .npy: it has {len(content) - header.offset:,} bytes of values, and its "
            f"header says {header.dtype} of shape {header.shape}"
        )
    values = np.frombuffer(content, header.dtype, offset=header.offset)
    return values.reshape(header.shape, order="F" if header.fortran else "C")
