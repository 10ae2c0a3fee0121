"""Gradients that are asked for: what backward keeps for them, and what it returns.

A backward kernel takes all of its tensors, with the shapes and dtypes of the gradients that it writes. A tensor whose
values it reads only for gradients that nobody asked for is not kept: an empty one of its dtype and number of rows is,
and the kernel reads others in its place.
"""

from collections.abc import Sequence

from torch import Tensor


def unread(rows: Tensor) -> Tensor:
    """Return what is kept in place of rows (N, D) that backward does not read: shape (N, 0), the same dtype."""
    return rows.new_empty((rows.shape[0], 0))


def readable(kept: Tensor | None, width: int) -> Tensor:
    """Return rows (N, D) as they were kept, or zeros of that shape for `unread` ones."""
    assert kept is not None
    return kept if kept.shape[1] else kept.new_zeros((kept.shape[0], width))


def only_asked(asked: Sequence[bool], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the gradients, with None for each that is not asked for."""
    return [grad if wanted else None for wanted, grad in zip(asked, grads, strict=True)]
