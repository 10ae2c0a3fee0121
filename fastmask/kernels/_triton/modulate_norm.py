"""Kernels of `modulate_norm`: a program iterates over some rows of one group, with its modulation in registers.

Backward sums the gradients of shift and scale over the rows in registers and writes each sum once; if several programs
share a group, their fp32 sums are added in a fixed order. No atomics, so results are deterministic.
"""

import torch
import triton
import triton.language as tl

from fastmask.kernels._triton._common import (
    finish_sums,
    group_rows,
    norm_gradient,
    num_chunks,
    partial_sums,
    row_settings,
    row_statistics,
)


@triton.jit
def _modulate_norm_fwd_kernel(
    x_ptr,  # (N, D)
    shift_ptr,  # (G, D)
    scale_ptr,  # (G, D)
    cu_seqlens_ptr,  # (G + 1,) if PACKED
    h_ptr,  # (N, D)
    stats_ptr,  # (2, N): mean, rstd
    num_rows,
    rows_per_group,
    shift_stride,
    scale_stride,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    RMS: tl.constexpr,
):
    i_group, i_chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_shift = tl.load(shift_ptr + i_group.to(tl.int64) * shift_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_scale = tl.load(scale_ptr + i_group.to(tl.int64) * scale_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    start, end = group_rows(cu_seqlens_ptr, rows_per_group, i_group, i_chunk, chunks, PACKED)
    for i_row in range(start, end):
        b_x = tl.load(x_ptr + i_row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        mean, rstd = row_statistics(b_x, m_d, eps, D, RMS)
        b_h = (b_x - mean) * rstd * (1.0 + b_scale) + b_shift
        tl.store(h_ptr + i_row * D + o_d, b_h.to(h_ptr.dtype.element_ty), mask=m_d)
        tl.store(stats_ptr + i_row, mean)
        tl.store(stats_ptr + num_rows + i_row, rstd)


@triton.jit
def _modulate_norm_bwd_kernel(
    grad_h_ptr,  # (N, D)
    x_ptr,  # (N, D)
    stats_ptr,  # (2, N)
    shift_ptr,  # (G, D)
    scale_ptr,  # (G, D)
    cu_seqlens_ptr,  # (G + 1,) if PACKED
    grad_x_ptr,  # (N, D)
    grad_shift_ptr,  # (G, chunks, D)
    grad_scale_ptr,  # (G, chunks, D)
    h_ptr,  # (N, D) if RECOMPUTE
    num_rows,
    rows_per_group,
    shift_stride,
    scale_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    RMS: tl.constexpr,
    RECOMPUTE: tl.constexpr,
):
    i_group, i_chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_scale = tl.load(scale_ptr + i_group.to(tl.int64) * scale_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    if RECOMPUTE:
        b_shift = tl.load(shift_ptr + i_group.to(tl.int64) * shift_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_grad_shift = tl.zeros([BLOCK], tl.float32)
    b_grad_scale = tl.zeros([BLOCK], tl.float32)
    start, end = group_rows(cu_seqlens_ptr, rows_per_group, i_group, i_chunk, chunks, PACKED)
    for i_row in range(start, end):
        b_grad_h = tl.load(grad_h_ptr + i_row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_x = tl.load(x_ptr + i_row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        mean, rstd = tl.load(stats_ptr + i_row), tl.load(stats_ptr + num_rows + i_row)
        b_xhat = (b_x - mean) * rstd
        b_grad_shift += b_grad_h
        b_grad_scale += b_grad_h * b_xhat
        b_grad_x = norm_gradient(b_grad_h * (1.0 + b_scale), b_xhat, rstd, D, RMS)
        tl.store(grad_x_ptr + i_row * D + o_d, b_grad_x.to(grad_x_ptr.dtype.element_ty), mask=m_d)
        if RECOMPUTE:
            b_h = b_xhat * (1.0 + b_scale) + b_shift
            tl.store(h_ptr + i_row * D + o_d, b_h.to(h_ptr.dtype.element_ty), mask=m_d)
    o_sum = (i_group.to(tl.int64) * chunks + i_chunk) * D + o_d
    tl.store(grad_shift_ptr + o_sum, b_grad_shift.to(grad_shift_ptr.dtype.element_ty), mask=m_d)
    tl.store(grad_scale_ptr + o_sum, b_grad_scale.to(grad_scale_ptr.dtype.element_ty), mask=m_d)


def launch_fwd(x, shift, scale, cu_seqlens, rms, eps, out_dtype):
    """Return h (N, D) and the statistics (2, N)."""
    num_rows, width = x.shape
    groups = shift.shape[0]
    settings = row_settings(width)
    h = torch.empty_like(x, dtype=out_dtype)
    stats = torch.empty(2, num_rows, dtype=torch.float32, device=x.device)
    grid = (groups, num_chunks(num_rows, groups, settings.rows_forward))
    _modulate_norm_fwd_kernel[grid](
        x,
        shift,
        scale,
        cu_seqlens,
        h,
        stats,
        num_rows,
        num_rows // max(1, groups),
        shift.stride(0),
        scale.stride(0),
        eps,
        D=width,
        BLOCK=settings.block,
        PACKED=cu_seqlens is not None,
        RMS=rms,
        num_warps=settings.num_warps,
    )
    return h, stats


def launch_bwd(grad_h, x, stats, shift, scale, cu_seqlens, rms, recompute):
    """Return the gradients of x, shift and scale, and the recomputed h (empty unless ``recompute``)."""
    num_rows, width = x.shape
    groups = shift.shape[0]
    settings = row_settings(width)
    chunks = num_chunks(num_rows, groups, settings.rows_backward)
    grad_x = torch.empty_like(x)
    sums = partial_sums([shift, scale], chunks)
    h = torch.empty_like(grad_h) if recompute else grad_h.new_empty(0)
    _modulate_norm_bwd_kernel[(groups, chunks)](
        grad_h,
        x,
        stats,
        shift,
        scale,
        cu_seqlens,
        grad_x,
        *sums,
        h,
        num_rows,
        num_rows // max(1, groups),
        shift.stride(0),
        scale.stride(0),
        D=width,
        BLOCK=settings.block,
        PACKED=cu_seqlens is not None,
        RMS=rms,
        RECOMPUTE=recompute,
        num_warps=settings.num_warps,
    )
    return grad_x, *finish_sums(sums, [shift, scale]), h
