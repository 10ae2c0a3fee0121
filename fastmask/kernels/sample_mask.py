"""Random masks: for each sample a uniformly random set of K of L positions.

Position l of sample n has the random key Philox(seed, n, l), 32 bits; the positions of the K smallest keys are kept,
with ties broken by position:

    kept[n, l] = |{l': (key[n, l'], l') < (key[n, l], l)}| < K

Both index lists are sorted by position, which makes memory access regular and does not affect results, since attention
is permutation-equivariant. Not differentiable. The kernel writes 4 (K + L) bytes per sample and reads none; with
PyTorch operations keys, sort order and flags go through memory several times.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask.kernels._dispatch import Impl, define_op, public_op, resolve_impl
from fastmask.kernels._layout import has_values, sample_of_row
from fastmask.kernels.philox import philox_words

MAX_LENGTH = 16384
_STREAM = 0


class Mask(NamedTuple):
    """Kept positions of each sample.

    Attributes:
        ids_keep: integer, shape (B, K), the kept positions; or packed, shape (N,), sample b's in rows cu_seqlens[b] ..
            cu_seqlens[b + 1] - 1.
        ids_restore: integer, shape (B, L), a permutation of [0, L) per sample; a value k < K means that the position is
            kept, as row k of the sample's kept tokens.
        cu_seqlens: int32, shape (B + 1,), for samples with unequal numbers of kept positions; None if all keep K.
    """

    ids_keep: Tensor
    ids_restore: Tensor
    cu_seqlens: Tensor | None = None

    @property
    def num_kept(self) -> Tensor | int:
        """Number of kept positions: K, or int32 of shape (B,) for unequal numbers."""
        return self.ids_keep.shape[1] if self.cu_seqlens is None else self.cu_seqlens.diff()

    @property
    def dropped(self) -> Tensor:
        """Bool, shape (B, L): True for dropped positions."""
        kept = self.num_kept
        return self.ids_restore >= (kept if isinstance(kept, int) else kept[:, None])


def sample_mask_reference(
    batch: int,
    length: int,
    keep: int | Tensor,
    *,
    seed: int | Tensor,
    offset: int | Tensor = 0,
    device: torch.device | str,
    total: int | None = None,
) -> Mask:
    """Reference for `sample_mask` in plain PyTorch; same arguments, any number of positions."""
    _check_counts(batch, length, keep, total)
    if isinstance(keep, Tensor):
        _check_values(keep, length, total)
    sample = torch.arange(batch, dtype=torch.int64, device=device) + offset
    order = philox_words(seed, sample, length, _STREAM).argsort(dim=1, stable=True)
    positions = torch.arange(length, device=device).expand(batch, length)
    count = keep[:, None] if isinstance(keep, Tensor) else keep
    kept = torch.empty_like(order).scatter_(1, order, positions) < count
    # The row of a position is its rank among the kept positions, or K plus its rank among the dropped ones.
    ids_restore = torch.where(kept, kept.cumsum(1) - 1, count - 1 + (~kept).cumsum(1))
    position_of_row = ids_restore.argsort(dim=1).int()
    if not isinstance(keep, Tensor):
        return Mask(position_of_row[:, :keep].contiguous(), ids_restore.int())
    assert total is not None
    cu_seqlens = _cu_seqlens(keep)
    of_row = sample_of_row(cu_seqlens, total)
    row = torch.arange(total, device=device) - cu_seqlens[of_row]
    return Mask(position_of_row[of_row, row], ids_restore.int(), cu_seqlens)


def _fwd_fake(
    seed: Tensor, offset: Tensor, cu_seqlens: Tensor | None, batch: int, length: int, keep: int, stream: int
) -> tuple[Tensor, Tensor]:
    shape = (batch, keep) if cu_seqlens is None else (keep,)
    return seed.new_empty(shape, dtype=torch.int32), seed.new_empty((batch, length), dtype=torch.int32)


sample_mask_fwd = define_op(
    "sample_mask_fwd(Tensor seed, Tensor offset, Tensor? cu_seqlens, SymInt batch, SymInt length, SymInt keep, "
    "int stream) -> (Tensor, Tensor)",
    fake=_fwd_fake,
    launcher="sample_mask:launch_fwd",
    native=lambda length: length <= MAX_LENGTH,
)


@public_op("sample_mask_fwd")
def sample_mask(
    batch: int,
    length: int,
    keep: int | Tensor,
    *,
    seed: int | Tensor,
    offset: int | Tensor = 0,
    device: torch.device | str,
    total: int | None = None,
    impl: Impl | None = None,
) -> Mask:
    """Return a uniformly random mask per sample.

    The fused form is bitwise equal to the reference; neither has a host sync. If ``seed`` and ``offset`` are tensors, a
    captured CUDA graph draws new masks at each replay after they are changed in place.

    Args:
        batch: B.
        length: L.
        keep: K, 1 <= K <= L; or K per sample, integer, shape (B,), on ``device``, which makes ``ids_keep`` packed.
            Counts per sample are checked on a CPU, outside torch.compile; elsewhere invalid counts are undefined
            behaviour.
        seed: the seed (64 bits), an int, or int64 of shape () on ``device``.
        offset: global index of the first sample, of a type like ``seed``; the mask of sample b depends on the seed and
            ``offset + b`` only.
        device: device of the mask.
        total: N, the sum of ``keep``; only with ``keep`` per sample.
        impl: "fused" (L up to 16384), "reference", or None for the device's default.

    Returns:
        A `Mask` of int32 indices, sorted by position: ``ids_keep`` (B, K), or (N,) with ``cu_seqlens`` (B + 1,), and
        ``ids_restore`` (B, L).

    Raises:
        ValueError: ``keep`` outside [1, ``length``], shapes or dtypes that do not fit, or inputs that the fused
            kernel does not support.
        BackendUnavailableError: no fused kernel on this device.
    """
    device = torch.device(device)
    _check_counts(batch, length, keep, total)
    _check_scalar("seed", seed)
    _check_scalar("offset", offset)
    if isinstance(keep, Tensor):
        _check_values(keep, length, total)
    for name, value in (("keep", keep), ("seed", seed), ("offset", offset)):
        if isinstance(value, Tensor) and not _is_on(value, device):
            raise ValueError(f"{name} must be on {device}, not on {value.device}")
    if resolve_impl(impl, "sample_mask_fwd", device, length) == "reference":
        return sample_mask_reference(batch, length, keep, seed=seed, offset=offset, device=device, total=total)
    if length > MAX_LENGTH:
        raise ValueError(
            f'the fused kernel takes a length up to {MAX_LENGTH}, not {length}: impl="reference" takes any'
        )
    cu_seqlens = _cu_seqlens(keep) if isinstance(keep, Tensor) else None
    ids_keep, ids_restore = sample_mask_fwd(
        _as_tensor(seed, device),
        _as_tensor(offset, device),
        cu_seqlens,
        batch,
        length,
        total if isinstance(keep, Tensor) else keep,
        _STREAM,
    )
    return Mask(ids_keep, ids_restore, cu_seqlens)


def _check_counts(batch: int, length: int, keep: int | Tensor, total: int | None) -> None:
    if batch < 0:
        raise ValueError(f"batch must be at least 0, not {batch}")
    if not isinstance(keep, Tensor):
        if total is not None:
            raise ValueError(f"total goes with a keep per sample, of shape ({batch},), not with the number {keep}")
        if not 1 <= keep <= length:
            raise ValueError(f"keep must be between 1 and the {length} positions, not {keep}")
        return
    if keep.shape != (batch,) or keep.is_floating_point() or keep.is_complex() or keep.dtype == torch.bool:
        raise ValueError(
            f"keep must be a number, or integer of shape ({batch},), not {keep.dtype} of shape {tuple(keep.shape)}"
        )
    if total is None or not batch <= total <= batch * length:
        raise ValueError(
            f"total must be the sum of keep, between {batch} and {batch * length} for {batch} samples of {length} "
            f"positions, not {total}"
        )


def _check_values(keep: Tensor, length: int, total: int | None) -> None:
    if not has_values(keep):
        return
    if ((keep < 1) | (keep > length)).any():
        raise ValueError(f"keep must be between 1 and the {length} positions for each sample, not {keep.tolist()}")
    if keep.sum() != total:
        raise ValueError(f"total must be the sum of keep, {int(keep.sum())}, not {total}")


def _check_scalar(name: str, value: int | Tensor) -> None:
    if isinstance(value, Tensor) and (value.shape != () or value.dtype != torch.int64):
        raise ValueError(
            f"{name} must be an int, or int64 of shape (), not {value.dtype} of shape {tuple(value.shape)}"
        )


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    """Return whether a tensor is on a device; a device without an index, like "cuda", matches any."""
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def _as_tensor(value: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value
    # torch.full avoids the host sync of copying a number to the device. Seeds can be unsigned.
    if not -(2**63) <= value < 2**63:
        value = (value + 2**63) % 2**64 - 2**63
    return torch.full((), value, dtype=torch.int64, device=device)


def _cu_seqlens(keep: Tensor) -> Tensor:
    return F.pad(keep.cumsum(0, dtype=torch.int32), (1, 0))
