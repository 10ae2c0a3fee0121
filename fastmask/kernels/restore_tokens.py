"""Gathering kept tokens, and restoring all positions (MaskDiT, arXiv 2306.09305).

    gather:   kept[b, k] = x[b, ids_keep[b, k]]
    restore:  restored[b, l] = position[l] + (x[b, ids_restore[b, l]] if that index is below K_b, else mask_token)
              h = norm(restored) * (1 + scale) + shift                      if a modulation is given

K_b is the number of kept tokens of sample b. With the gradient g of restored (path through h included), backward is

    gather:   grad_x[b, ids_keep[b, k]] = grad_kept[b, k], zero elsewhere
    restore:  grad_x[b, ids_restore[b, l]] = g[b, l],  grad_mask_token = sum of g over the dropped positions

Copies are exact, sums are fp32. Backward keeps only the indices, and with a modulation restored and two statistics per
position. Memory traffic of restore: x and restored (and h) forward; g (both parts) and grad_x backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmask.kernels._asked import only_asked
from fastmask.kernels._dispatch import Impl, define_op, public_op, resolve_impl
from fastmask.kernels._layout import (
    as_rows,
    check_bounds,
    check_cu_seqlens,
    check_devices,
    check_dtype,
    check_index_range,
    check_permutations,
    check_tensors,
    check_tokens,
    native_rows,
    needs_gradient,
    num_samples,
    position_table,
    sample_of_row,
)
from fastmask.kernels.modulate_norm import Norm, check_norm, modulate_norm_reference, norm_gradients, norm_kept


def gather_tokens_reference(x: Tensor, ids_keep: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Reference for `gather_tokens` in plain PyTorch; same arguments, any dtype and width."""
    if cu_seqlens is not None:
        return x[sample_of_row(cu_seqlens, ids_keep.shape[0]), ids_keep.long()]
    return torch.gather(x, 1, ids_keep.long()[..., None].expand(-1, -1, x.shape[-1]))


def restore_tokens_reference(
    x: Tensor,
    mask_token: Tensor,
    position: Tensor,
    ids_restore: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    norm: Norm = "layer",
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """Reference for `restore_tokens` in plain PyTorch; any floating dtype and width, differentiable in position too."""
    position = position_table(position)
    rows = F.pad(x, (0, 0, 0, 1))  # an extra row for dropped positions to read, since there may be none
    if cu_seqlens is None:
        kept = ids_restore < x.shape[1]
        placed = gather_tokens_reference(rows, ids_restore.clamp(max=x.shape[1]))
    else:
        kept = ids_restore < cu_seqlens.diff()[:, None]
        placed = rows[torch.where(kept, cu_seqlens[:-1, None] + ids_restore, x.shape[0])]
    restored = torch.where(kept[..., None], placed, mask_token.to(x.dtype)) + position
    if shift is None or scale is None:
        return restored
    return restored, modulate_norm_reference(restored, shift, scale, norm=norm, eps=eps)


def _fwd_fake(
    x: Tensor,
    mask_token: Tensor,
    position: Tensor,
    ids_restore: Tensor,
    cu_seqlens: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = ids_restore.shape[0] * ids_restore.shape[1]
    restored = x.new_empty((rows, x.shape[1]), dtype=torch.promote_types(x.dtype, position.dtype))
    if shift is None:
        return restored, restored.new_empty(0), x.new_empty(0, dtype=torch.float32)
    return restored, torch.empty_like(restored), x.new_empty((2, rows), dtype=torch.float32)


def _bwd_fake(
    grad_restored: Tensor,
    grad_norm: Tensor | None,
    mask_token: Tensor,
    ids_restore: Tensor,
    cu_seqlens: Tensor | None,
    num_kept: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return grad_restored.new_empty((num_kept, mask_token.shape[0]), dtype=dtype), torch.empty_like(mask_token)


def _gather_fwd_fake(x: Tensor, ids_keep: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return x.new_empty((*ids_keep.shape, x.shape[2]))


def _gather_bwd_fake(grad: Tensor, ids_keep: Tensor, cu_seqlens: Tensor | None, batch: int, length: int) -> Tensor:
    return grad.new_empty((batch, length, grad.shape[-1]))


def _native(x: Tensor, mask_token: Tensor, position: Tensor, shift: Tensor | None, scale: Tensor | None) -> bool:
    return native_rows(x, mask_token, position, shift, scale) and not needs_gradient(position)


restore_tokens_fwd = define_op(
    "restore_tokens_fwd(Tensor x, Tensor mask_token, Tensor position, Tensor ids_restore, Tensor? cu_seqlens, "
    "Tensor? shift, Tensor? scale, bool rms, float eps) -> (Tensor, Tensor, Tensor)",
    fake=_fwd_fake,
    launcher="restore_tokens:launch_fwd",
    native=_native,
)
restore_tokens_bwd = define_op(
    "restore_tokens_bwd(Tensor grad_restored, Tensor? grad_norm, Tensor mask_token, Tensor ids_restore, "
    "Tensor? cu_seqlens, SymInt num_kept, ScalarType dtype) -> (Tensor, Tensor)",
    fake=_bwd_fake,
    launcher="restore_tokens:launch_bwd",
)
gather_tokens_fwd = define_op(
    "gather_tokens_fwd(Tensor x, Tensor ids_keep, Tensor? cu_seqlens) -> Tensor",
    fake=_gather_fwd_fake,
    launcher="restore_tokens:launch_gather_fwd",
    native=native_rows,
)
gather_tokens_bwd = define_op(
    "gather_tokens_bwd(Tensor grad, Tensor ids_keep, Tensor? cu_seqlens, SymInt batch, SymInt length) -> Tensor",
    fake=_gather_bwd_fake,
    launcher="restore_tokens:launch_gather_bwd",
)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ids_keep: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        ctx.save_for_backward(ids_keep, cu_seqlens)
        ctx.batch, ctx.length = x.shape[:2]
        kept: Tensor = gather_tokens_fwd(x, ids_keep, cu_seqlens)
        return kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gather_tokens_bwd(grad.contiguous(), *ctx.saved_tensors, ctx.batch, ctx.length), None, None


class _RestoreTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask_token: Tensor,
        position: Tensor,
        ids_restore: Tensor,
        cu_seqlens: Tensor | None,
        shift: Tensor | None,
        scale: Tensor | None,
        rms: bool,
        eps: float,
    ) -> Any:
        restored, h, stats = restore_tokens_fwd(
            x, mask_token, position, ids_restore, cu_seqlens, shift, scale, rms, eps
        )
        of_x, of_mask_token, *_, of_shift, of_scale, _, _ = ctx.needs_input_grad
        ctx.num_kept, ctx.dtype, ctx.mask_dtype, ctx.rms = x.shape[0], x.dtype, mask_token.dtype, rms
        ids = (ids_restore, cu_seqlens) if of_x or of_mask_token else (None, None)
        if shift is None or scale is None:
            ctx.save_for_backward(*ids)
            return restored
        asked = of_x or of_mask_token, of_shift, of_scale
        ctx.save_for_backward(*ids, *norm_kept(restored, stats, shift, scale, None, asked))
        if not asked[0]:
            ctx.mark_non_differentiable(restored)
        return restored, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_restored: Tensor, grad_h: Tensor | None = None) -> tuple[Tensor | None, ...]:
        ids_restore, cu_seqlens, *kept = ctx.saved_tensors
        grad_norm = grad_shift = grad_scale = grad_x = grad_mask_token = None
        if grad_h is not None:
            grad_norm, grad_shift, grad_scale, _ = norm_gradients(grad_h, kept, ctx.rms)
        if ids_restore is not None:
            mask_token = grad_restored.new_empty(grad_restored.shape[-1], dtype=ctx.mask_dtype)  # not read
            grad_x, grad_mask_token = restore_tokens_bwd(
                grad_restored.contiguous(), grad_norm, mask_token, ids_restore, cu_seqlens, ctx.num_kept, ctx.dtype
            )
        grads = only_asked(
            ctx.needs_input_grad, (grad_x, grad_mask_token, None, None, None, grad_shift, grad_scale, None, None)
        )
        return tuple(grads)


@public_op("gather_tokens_fwd", "gather_tokens_bwd")
def gather_tokens(x: Tensor, ids_keep: Tensor, *, cu_seqlens: Tensor | None = None, impl: Impl | None = None) -> Tensor:
    """Return the kept tokens.

    Equivalent PyTorch: ``torch.gather(x, 1, ids_keep[..., None].expand(-1, -1, D))``. Differentiable in x; result and
    gradient are bitwise equal to the reference. Undefined for an index outside [0, L) and, in the fused backward, for
    an index that occurs twice in a sample; native CPU kernels raise a RuntimeError.

    Args:
        x: shape (B, L, D); copied first if not contiguous.
        ids_keep: int32 or int64, kept positions of each sample, distinct and in any order, shape (B, K), or packed (N,)
            with ``cu_seqlens``.
        cu_seqlens: int32 or int64, shape (B + 1,), non-decreasing from 0 to N: boundaries of packed samples. Values
            are checked on a CPU, outside torch.compile.
        impl: "fused" (float32, bfloat16, float16; D a multiple of 8 up to 8192), "reference", or None for the device's
            default.

    Returns:
        Shape (B, K, D), or (N, D) with ``cu_seqlens``, in the dtype of ``x``.

    Raises:
        ValueError: shapes that do not fit, or inputs that the fused kernels do not support.
        BackendUnavailableError: no fused kernel on this device.
    """
    check_tensors(x=x)
    if x.ndim != 3:
        raise ValueError(f"x must have shape (B, L, D), not {tuple(x.shape)}")
    check_devices(x.device, ids_keep=ids_keep, cu_seqlens=cu_seqlens)
    _check_indices("ids_keep", ids_keep)
    if cu_seqlens is None and (ids_keep.ndim != 2 or ids_keep.shape[0] != x.shape[0]):
        raise ValueError(f"ids_keep must have shape ({x.shape[0]}, K), not {tuple(ids_keep.shape)}")
    if cu_seqlens is None and ids_keep.shape[1] > x.shape[1]:
        raise ValueError(f"ids_keep of shape {tuple(ids_keep.shape)} keeps more than the {x.shape[1]} positions of x")
    if cu_seqlens is not None:
        if ids_keep.ndim != 1:
            raise ValueError(f"ids_keep must have shape (N,) with cu_seqlens, not {tuple(ids_keep.shape)}")
        check_cu_seqlens(cu_seqlens)
        _check_shape("cu_seqlens", cu_seqlens, (x.shape[0] + 1,), x)
        check_bounds(cu_seqlens, ids_keep.shape[0], "entries of ids_keep", x.shape[1])
    if resolve_impl(impl, "gather_tokens_fwd", x.device, x) == "reference":
        return gather_tokens_reference(x, ids_keep, cu_seqlens=cu_seqlens)
    check_index_range("ids_keep", ids_keep, x.shape[1], "gather_tokens_fwd")
    rows = as_rows(x, cu_seqlens, {})
    whole = rows.x.view(x.shape)
    return _GatherTokens.apply(whole, ids_keep.contiguous(), rows.cu_seqlens)  # type: ignore[no-any-return,no-untyped-call]


@public_op("restore_tokens_fwd", "restore_tokens_bwd", "modulate_norm_bwd")
def restore_tokens(
    x: Tensor,
    mask_token: Tensor,
    position: Tensor,
    ids_restore: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    norm: Norm = "layer",
    eps: float = 1e-6,
    impl: Impl | None = None,
) -> Any:
    """Return all positions: kept tokens in place, the mask token elsewhere, plus the position table.

    Equivalent PyTorch: ``torch.where((ids_restore < K)[..., None], placed, mask_token) + position``, where ``placed``
    is the rows of ``x`` at ``ids_restore``; with a modulation, also its `modulate_norm` in the same launch. Restored is
    bitwise equal to the reference; its norm is computed in fp32 and rounded once. Differentiable in x, mask_token,
    shift and scale, the reference also in position; each gradient has its input's dtype. Deterministic.

    Args:
        x: kept tokens, shape (B, K, E), or (N, E) with ``cu_seqlens``; copied first if not contiguous.
        mask_token: shape (E,); rounded to the dtype of ``x`` first.
        position: shape (L, E), or (1, L, E).
        ids_restore: int32 or int64, shape (B, L), a permutation of [0, L) per sample: a value below K is the row of
            ``x`` of a kept position. Undefined if it is not a permutation.
        cu_seqlens: int32 or int64, shape (B + 1,), non-decreasing from 0 to N: boundaries of packed samples. Values
            are checked on a CPU, outside torch.compile.
        shift: per sample, shape (B, E); given together with ``scale``.
        scale: like ``shift``.
        norm: "layer" or "rms".
        eps: added to the variance (to the mean square for "rms").
        impl: "fused" (float32, bfloat16, float16; E a multiple of 8 up to 8192), "reference", or None for the device's
            default.

    Returns:
        Shape (B, L, E), in the promoted dtype of ``x`` and ``position``; with a modulation also its modulated norm,
        with the same shape and dtype.

    Raises:
        ValueError: shapes that do not fit, inputs that the fused kernels do not support, or a position table that
            requires a gradient in the fused form.
        BackendUnavailableError: no fused kernel on this device.
    """
    check_norm(norm, eps)
    check_tokens("x", x, cu_seqlens)
    others = {"mask_token": mask_token, "position": position, "ids_restore": ids_restore}
    check_devices(x.device, **others, cu_seqlens=cu_seqlens, shift=shift, scale=scale)
    batch, width = num_samples(x, cu_seqlens), x.shape[-1]
    given, position = tuple(position.shape), position_table(position)
    if mask_token.shape != (width,) or position.ndim != 2 or position.shape[1] != width:
        raise ValueError(
            f"mask_token and position must have shapes ({width},) and (L, {width}) or (1, L, {width}) for x of shape "
            f"{tuple(x.shape)}, not {tuple(mask_token.shape)} and {given}"
        )
    _check_indices("ids_restore", ids_restore)
    _check_shape("ids_restore", ids_restore, (batch, position.shape[0]), x)
    if cu_seqlens is not None:
        check_bounds(cu_seqlens, x.shape[0], "rows of x", position.shape[0])
    elif x.shape[1] > position.shape[0]:
        raise ValueError(f"x of shape {tuple(x.shape)} has more tokens than the {position.shape[0]} positions")
    if (shift is None) != (scale is None):
        raise ValueError(f"shift and scale belong together, and {'shift' if shift is None else 'scale'} is missing")
    if shift is not None and scale is not None:
        _check_shape("shift", shift, (batch, width), x)
        _check_shape("scale", scale, (batch, width), x)
    tensors = x, mask_token, position, shift, scale
    if resolve_impl(impl, "restore_tokens_fwd", x.device, *tensors) == "reference":
        return restore_tokens_reference(
            x, mask_token, position, ids_restore, cu_seqlens=cu_seqlens, shift=shift, scale=scale, norm=norm, eps=eps
        )
    check_index_range("ids_restore", ids_restore, position.shape[0], "restore_tokens_fwd")
    check_permutations("ids_restore", ids_restore, "restore_tokens_fwd")
    if needs_gradient(position):
        raise ValueError(f'position of shape {given} must not require a gradient: only impl="reference" has it')
    rows = as_rows(x, cu_seqlens, {})
    check_dtype("mask_token", mask_token)
    check_dtype("position", position)
    if shift is not None and scale is not None:
        check_dtype("shift", shift)
        check_dtype("scale", scale)
        shift, scale = (t if t.stride(-1) == 1 else t.contiguous() for t in (shift, scale))
    fixed = (mask_token.contiguous(), position.contiguous(), ids_restore.contiguous(), rows.cu_seqlens)
    # float(): Dynamo cannot pass a symbolic number to a Function twice.
    out = _RestoreTokens.apply(rows.x, *fixed, shift, scale, norm == "rms", float(eps))  # type: ignore[no-untyped-call]
    shape = (*ids_restore.shape, width)
    return out.view(shape) if shift is None else (out[0].view(shape), out[1].view(shape))


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}, for x of shape {tuple(x.shape)}")


def _check_indices(name: str, ids: Tensor) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, not {ids.dtype} of shape {tuple(ids.shape)}")
