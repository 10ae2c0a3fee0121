"""Random masks: for each sample a uniformly random set of K of L positions.

Position l of sample n has the random key Philox(seed, n, l); the K smallest keys are kept. Both index lists are sorted
by position, which makes memory access regular and changes no result: attention knows no order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.kernels.philox import philox_words

_STREAM = 0


class Mask(NamedTuple):
    """Which positions of each sample are kept.

    Attributes:
        ids_keep: integer, shape (B, K), the kept positions.
        ids_restore: integer, shape (B, L), a permutation of [0, L) per sample; a value k < K says that the position is
            kept and is row k of the kept tokens.
    """

    ids_keep: Tensor
    ids_restore: Tensor

    @property
    def dropped(self) -> Tensor:
        """Bool, shape (B, L): True where a position was dropped."""
        return self.ids_restore >= self.ids_keep.shape[1]


def sample_mask(
    batch: int, length: int, keep: int, *, seed: int | Tensor, offset: int | Tensor = 0, device: torch.device | str
) -> Mask:
    """Return a uniformly random mask per sample.

    Args:
        batch: B.
        length: L.
        keep: K, 1 <= K <= L.
        seed: the run's seed.
        offset: global index of the first sample: sample b gets the mask of index ``offset + b`` wherever it is drawn.
        device: where the mask is made.

    Returns:
        A `Mask` of int32 indices, sorted by position: ``ids_keep`` (B, K) and ``ids_restore`` (B, L).

    Raises:
        ValueError: ``keep`` outside [1, ``length``].
    """
    if not 1 <= keep <= length:
        raise ValueError(f"keep must be between 1 and the {length} positions, not {keep}")
    sample = torch.arange(batch, dtype=torch.int64, device=device) + offset
    order = philox_words(seed, sample, length, _STREAM).argsort(dim=1, stable=True)
    ids_keep = order[:, :keep].sort(dim=1).values
    kept = torch.zeros(batch, length, dtype=torch.bool, device=device).scatter_(1, ids_keep, value=True)
    # A position's row is its rank among the kept positions, or K plus its rank among the dropped ones.
    ids_restore = torch.where(kept, kept.cumsum(1) - 1, keep - 1 + (~kept).cumsum(1))
    return Mask(ids_keep.int(), ids_restore.int())
