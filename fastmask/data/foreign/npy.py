"""A strict .npy parser for untrusted files: plain headers only, and the exact number of values."""

import math
import re
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_MAGIC = b"\x93NUMPY"
# The header that numpy writes for numeric arrays. numpy's own reader evaluates it as Python, and allocates the size it
# claims.
_HEADER = re.compile(
    rb"\{'descr': '([<>|=])(f[248]|[iu][1248])', 'fortran_order': (True|False), 'shape': \(([0-9, ]*)\), \} *\n?"
)
_MAX_DIGITS = 15  # per dimension


class Header(NamedTuple):
    """An .npy header: dtype, memory order and shape, and the byte offset of the values."""

    dtype: np.dtype[Any]
    fortran: bool
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def parse_header(content: bytes, name: str) -> Header:
    """Parse the header of an .npy.

    Args:
        content: the first bytes of the file, including the whole header.
        name: file name, for messages.

    Raises:
        ValueError: the content is not an .npy of numbers.
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
    """Return the array of an .npy; a ValueError if the number of values does not match the header."""
    header = parse_header(content, name)
    if header.bytes != len(content) - header.offset:
        raise ValueError(
            f"{name} cannot be read as an .npy: it has {len(content) - header.offset:,} bytes of values, and its "
            f"header says {header.dtype} of shape {header.shape}"
        )
    values = np.frombuffer(content, header.dtype, offset=header.offset)
    return values.reshape(header.shape, order="F" if header.fortran else "C")
