"""Kernels of `restore_tokens` and `gather_tokens`.

restore: a program iterates over some of the L positions of one sample, with the mask token (and the modulation) in
registers. A row is read once, then written and normalised from registers. In backward, every kept row receives its
gradient from exactly one position, so no zero fill is needed; the program sums the mask token gradient over its dropped
rows and writes one fp32 partial sum, and these are added in a fixed order. No atomics, so results are deterministic.

gather: a program iterates over some of the kept rows of one sample and copies them from or to the L positions.
"""

import torch
import triton
import triton.language as tl

from fastmask.kernels._triton._common import (
    finish_sums,
    group_rows,
    num_chunks,
    partial_sums,
    row_settings,
    row_statistics,
)


@triton.jit
def _restore_tokens_fwd_kernel(
    x_ptr,  # (N, E)
    mask_token_ptr,  # (E,)
    position_ptr,  # (L, E)
    ids_restore_ptr,  # (B, L)
    cu_seqlens_ptr,  # (B + 1,) if PACKED
    shift_ptr,  # (B, E) if NORM
    scale_ptr,  # (B, E) if NORM
    restored_ptr,  # (B * L, E)
    h_ptr,  # (B * L, E) if NORM
    stats_ptr,  # (2, B * L) if NORM: mean, rstd
    num_rows,
    length,
    keep,
    shift_stride,
    scale_stride,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    NORM: tl.constexpr,
    RMS: tl.constexpr,
):
    i_b, i_chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    # Rounded to the dtype of x, since the token replaces a row of it.
    b_token = tl.load(mask_token_ptr + o_d, mask=m_d, other=0.0).to(x_ptr.dtype.element_ty).to(tl.float32)
    if NORM:
        b_shift = tl.load(shift_ptr + i_b * shift_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_scale = tl.load(scale_ptr + i_b * scale_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    first, last = kept_rows(cu_seqlens_ptr, keep, i_b, PACKED)
    start, end = group_rows(cu_seqlens_ptr, length, i_b, i_chunk, chunks, False)
    for i_row in range(start, end):
        i_kept = first + tl.load(ids_restore_ptr + i_row).to(tl.int64)
        kept = i_kept < last
        m_kept = tl.where(kept, m_d, False)
        b_x = tl.load(x_ptr + i_kept * D + o_d, mask=m_kept, other=0.0).to(tl.float32)
        b_position = tl.load(position_ptr + (i_row - i_b * length) * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_restored = (tl.where(kept, b_x, b_token) + b_position).to(restored_ptr.dtype.element_ty)
        tl.store(restored_ptr + i_row * D + o_d, b_restored, mask=m_d)
        if NORM:
            # Normalise the rounded row, as seen by backward and the next op.
            b_row = b_restored.to(tl.float32)
            mean, rstd = row_statistics(b_row, m_d, eps, D, RMS)
            b_h = (b_row - mean) * rstd * (1.0 + b_scale) + b_shift
            tl.store(h_ptr + i_row * D + o_d, b_h.to(h_ptr.dtype.element_ty), mask=m_d)
            tl.store(stats_ptr + i_row, mean)
            tl.store(stats_ptr + num_rows + i_row, rstd)


@triton.jit
def _restore_tokens_bwd_kernel(
    grad_restored_ptr,  # (B * L, E)
    grad_norm_ptr,  # (B * L, E) if NORM: gradient of the restored rows through their norm
    ids_restore_ptr,  # (B, L)
    cu_seqlens_ptr,  # (B + 1,) if PACKED
    grad_x_ptr,  # (N, E)
    grad_token_ptr,  # (B, chunks, E)
    length,
    keep,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    NORM: tl.constexpr,
):
    i_b, i_chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_grad_token = tl.zeros([BLOCK], tl.float32)
    first, last = kept_rows(cu_seqlens_ptr, keep, i_b, PACKED)
    start, end = group_rows(cu_seqlens_ptr, length, i_b, i_chunk, chunks, False)
    for i_row in range(start, end):
        i_kept = first + tl.load(ids_restore_ptr + i_row).to(tl.int64)
        kept = i_kept < last
        m_kept = tl.where(kept, m_d, False)
        b_grad = tl.load(grad_restored_ptr + i_row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        if NORM:
            b_grad += tl.load(grad_norm_ptr + i_row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + i_kept * D + o_d, b_grad.to(grad_x_ptr.dtype.element_ty), mask=m_kept)
        b_grad_token += tl.where(kept, 0.0, b_grad)
    o_sum = (i_b * chunks + i_chunk) * D + o_d
    tl.store(grad_token_ptr + o_sum, b_grad_token.to(grad_token_ptr.dtype.element_ty), mask=m_d)


@triton.jit
def _gather_tokens_kernel(
    whole_ptr,  # (B, L, D)
    kept_ptr,  # (N, D)
    ids_keep_ptr,  # (N,)
    cu_seqlens_ptr,  # (B + 1,) if PACKED
    length,
    keep,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    i_b, i_chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    start, end = group_rows(cu_seqlens_ptr, keep, i_b, i_chunk, chunks, PACKED)
    for i_row in range(start, end):
        i_whole = i_b * length + tl.load(ids_keep_ptr + i_row).to(tl.int64)
        p_whole, p_kept = whole_ptr + i_whole * D + o_d, kept_ptr + i_row * D + o_d
        if BACKWARD:
            tl.store(p_whole, tl.load(p_kept, mask=m_d, other=0.0), mask=m_d)
        else:
            tl.store(p_kept, tl.load(p_whole, mask=m_d, other=0.0), mask=m_d)


@triton.jit
def kept_rows(cu_seqlens_ptr, keep, i_b, PACKED: tl.constexpr):
    """Return the first and end kept row of a sample."""
    return group_rows(cu_seqlens_ptr, keep, i_b, 0, 1, PACKED)


def launch_fwd(x, mask_token, position, ids_restore, cu_seqlens, shift, scale, rms, eps):
    """Return restored rows (B * L, E), their modulated norm and its statistics (2, B * L), or two empty tensors."""
    batch, length = ids_restore.shape
    num_rows, width = batch * length, x.shape[1]
    normed = shift is not None
    settings = row_settings(width)
    restored = x.new_empty((num_rows, width), dtype=torch.promote_types(x.dtype, position.dtype))
    h = restored.new_empty(restored.shape if normed else 0)
    stats = x.new_empty((2, num_rows) if normed else 0, dtype=torch.float32)
    _restore_tokens_fwd_kernel[(batch, num_chunks(num_rows, batch, settings.rows_forward))](
        x,
        mask_token,
        position,
        ids_restore,
        cu_seqlens,
        shift,
        scale,
        restored,
        h,
        stats,
        num_rows,
        length,
        x.shape[0] // max(1, batch),
        shift.stride(0) if normed else 0,
        scale.stride(0) if normed else 0,
        eps,
        D=width,
        BLOCK=settings.block,
        PACKED=cu_seqlens is not None,
        NORM=normed,
        RMS=rms,
        num_warps=settings.num_warps,
    )
    return restored, h, stats


def launch_bwd(grad_restored, grad_norm, mask_token, ids_restore, cu_seqlens, num_kept, dtype):
    """Return the gradients of x (num_kept, E) in ``dtype``, and of the mask token."""
    batch, length = ids_restore.shape
    width = mask_token.shape[0]
    settings = row_settings(width)
    chunks = num_chunks(batch * length, batch, settings.rows_backward)
    grad_x = grad_restored.new_empty((num_kept, width), dtype=dtype)
    # All samples share the mask token, so its sum is over one group of batch * chunks programs.
    token = [mask_token[None]]
    sums = partial_sums(token, batch * chunks)
    _restore_tokens_bwd_kernel[(batch, chunks)](
        grad_restored,
        grad_norm,
        ids_restore,
        cu_seqlens,
        grad_x,
        *sums,
        length,
        num_kept // max(1, batch),
        D=width,
        BLOCK=settings.block,
        PACKED=cu_seqlens is not None,
        NORM=grad_norm is not None,
        num_warps=settings.num_warps,
    )
    return grad_x, finish_sums(sums, token)[0][0]


def launch_gather_fwd(x, ids_keep, cu_seqlens):
    """Return the kept rows, (B, K, D) or packed (N, D)."""
    kept = x.new_empty((*ids_keep.shape, x.shape[2]))
    _launch_gather(x, kept, ids_keep, cu_seqlens, False)
    return kept


def launch_gather_bwd(grad, ids_keep, cu_seqlens, batch, length):
    """Return the gradient of x, (batch, length, D), zero at dropped positions."""
    grad_x = grad.new_zeros((batch, length, grad.shape[-1]))
    _launch_gather(grad_x, grad, ids_keep, cu_seqlens, True)
    return grad_x


def _launch_gather(whole, kept, ids_keep, cu_seqlens, backward):
    batch, length, width = whole.shape
    num_kept = ids_keep.numel()
    settings = row_settings(width)
    _gather_tokens_kernel[(batch, num_chunks(num_kept, batch, settings.rows_forward))](
        whole,
        kept,
        ids_keep,
        cu_seqlens,
        length,
        num_kept // max(1, batch),
        D=width,
        BLOCK=settings.block,
        PACKED=cu_seqlens is not None,
        BACKWARD=backward,
        num_warps=settings.num_warps,
    )
