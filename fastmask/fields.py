"""Fields of configuration dataclasses: what may change when a run is resumed, bounds, names that are not known.

A field is declared as ``lr: float = 1e-4``: a resumed run may change it, and the change is recorded with its step.
`free` declares one that does not affect what is learned, `fixed` one that cannot change, and `free_within` one that is
free among the values of a kind. What is declared for a member, such as ``network``, holds for its fields that declare
nothing themselves; `recorded` is for their exceptions.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def free(default: T) -> T:
    """Return a dataclass field that a resumed run may change without a record of the change."""
    return dataclasses.field(default=default, metadata={"free": True})


def recorded(default: T) -> T:
    """Return a dataclass field that a resumed run may change, of a member that is `free` or `fixed` otherwise."""
    return dataclasses.field(default=default, metadata={"recorded": True})


def fixed(default: T, reason: str) -> T:
    """Return a dataclass field that a resumed run cannot change, for a reason that the error message gives."""
    return dataclasses.field(default=default, metadata={"fixed": reason})


def free_within(default: T, kind: Callable[[T], object], reason: str) -> T:
    """Return a dataclass field that is `free` to change to a value of the same kind, and `fixed` otherwise.

    Args:
        default: the default value.
        kind: returns the kind of a value, which is compared.
        reason: why the kind cannot change.
    """
    return dataclasses.field(default=default, metadata={"within": (kind, reason)})


def recorded_within(default: T, kind: Callable[[T], object], reason: str) -> T:
    """Return a dataclass field like `free_within`, of which a change within a kind is recorded."""
    return dataclasses.field(default=default, metadata={"recorded_within": (kind, reason)})


def check_at_least(owner: object, **lowest: float) -> None:
    """Raise a ValueError for the first of these fields that is below its bound, infinite or NaN."""
    for name, bound in lowest.items():
        value = getattr(owner, name)
        if not bound <= value < math.inf:
            raise ValueError(f"{name} must be at least {bound}, not {value}")


def check_share(owner: object, name: str) -> None:
    """Raise a ValueError unless a field is in [0, 1]."""
    value = getattr(owner, name)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], not {value}")


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown name, with the known names that are similar, or else all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
    return f"unknown {what} {name!r}: did you mean {' or '.join(near)}?"
