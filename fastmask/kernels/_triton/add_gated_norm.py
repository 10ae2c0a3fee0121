"""Kernels of `add_gated_norm`, tiled as in `modulate_norm`: a program iterates over some rows of one group.

The residual is read once and written once in each direction; its new value stays in registers for the norm.
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

# Warps of backward without a residual gradient, by width and bytes per value. Half as many, as in `row_settings`, would
# spill a few registers on sm_80.
_WARPS_WITHOUT_RESIDUAL = {(192, 4): 2, (384, 2): 2, (768, 4): 4}


@triton.jit
def _add_gated_norm_fwd_kernel(
    x_ptr,  # (N, D)
    branch_ptr,  # (N, D)
    gate_ptr,  # (G, D)
    shift_ptr,  # (G, D)
    scale_ptr,  # (G, D)
    cu_seqlens_ptr,  # (G + 1,) if PACKED
    x_new_ptr,  # (N, D)
    h_ptr,  # (N, D)
    stats_ptr,  # (2, N): mean, rstd
    num_rows,
    rows_per_group,
    gate_stride,
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
    b_gate = tl.load(gate_ptr + i_group.to(tl.int64) * gate_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_shift = tl.load(shift_ptr + i_group.to(tl.int64) * shift_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_scale = tl.load(scale_ptr + i_group.to(tl.int64) * scale_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    start, end = group_rows(cu_seqlens_ptr, rows_per_group, i_group, i_chunk, chunks, PACKED)
    for i_row in range(start, end):
        b_x = tl.load(x_ptr + i_row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_branch = tl.load(branch_ptr + i_row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_new = (b_x + b_gate * b_branch).to(x_new_ptr.dtype.element_ty)
        tl.store(x_new_ptr + i_row * D + o_d, b_new, mask=m_d)
        b_x = b_new.to(tl.float32)  # normalise the rounded residual, as seen by backward
        mean, rstd = row_statistics(b_x, m_d, eps, D, RMS)
        b_h = (b_x - mean) * rstd * (1.0 + b_scale) + b_shift
        tl.store(h_ptr + i_row * D + o_d, b_h.to(h_ptr.dtype.element_ty), mask=m_d)
        tl.store(stats_ptr + i_row, mean)
        tl.store(stats_ptr + num_rows + i_row, rstd)


@triton.jit
def _add_gated_norm_bwd_kernel(
    grad_new_ptr,  # (N, D) if RESIDUAL
    grad_h_ptr,  # (N, D)
    x_new_ptr,  # (N, D)
    stats_ptr,  # (2, N)
    branch_ptr,  # (N, D)
    gate_ptr,  # (G, D)
    shift_ptr,  # (G, D)
    scale_ptr,  # (G, D)
    cu_seqlens_ptr,  # (G + 1,) if PACKED
    grad_x_ptr,  # (N, D)
    grad_branch_ptr,  # (N, D)
    grad_gate_ptr,  # (G, chunks, D)
    grad_shift_ptr,  # (G, chunks, D)
    grad_scale_ptr,  # (G, chunks, D)
    h_ptr,  # (N, D) if RECOMPUTE
    num_rows,
    rows_per_group,
    gate_stride,
    shift_stride,
    scale_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    RMS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RECOMPUTE: tl.constexpr,
):
    i_group, i_chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_gate = tl.load(gate_ptr + i_group.to(tl.int64) * gate_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_scale = tl.load(scale_ptr + i_group.to(tl.int64) * scale_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    if RECOMPUTE:
        b_shift = tl.load(shift_ptr + i_group.to(tl.int64) * shift_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_grad_gate = tl.zeros([BLOCK], tl.float32)
    b_grad_shift = tl.zeros([BLOCK], tl.float32)
    b_grad_scale = tl.zeros([BLOCK], tl.float32)
    start, end = group_rows(cu_seqlens_ptr, rows_per_group, i_group, i_chunk, chunks, PACKED)
    for i_row in range(start, end):
        b_grad_h = tl.load(grad_h_ptr + i_row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_x = tl.load(x_new_ptr + i_row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_branch = tl.load(branch_ptr + i_row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        mean, rstd = tl.load(stats_ptr + i_row), tl.load(stats_ptr + num_rows + i_row)
        b_xhat = (b_x - mean) * rstd
        b_grad_shift += b_grad_h
        b_grad_scale += b_grad_h * b_xhat
        b_grad_x = norm_gradient(b_grad_h * (1.0 + b_scale), b_xhat, rstd, D, RMS)
        if RESIDUAL:
            b_grad_x += tl.load(grad_new_ptr + i_row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_grad_gate += b_grad_x * b_branch
        tl.store(grad_x_ptr + i_row * D + o_d, b_grad_x.to(grad_x_ptr.dtype.element_ty), mask=m_d)
        b_grad_branch = b_grad_x * b_gate
        tl.store(grad_branch_ptr + i_row * D + o_d, b_grad_branch.to(grad_branch_ptr.dtype.element_ty), mask=m_d)
        if RECOMPUTE:
            b_h = b_xhat * (1.0 + b_scale) + b_shift
            tl.store(h_ptr + i_row * D + o_d, b_h.to(h_ptr.dtype.element_ty), mask=m_d)
    o_sum = (i_group.to(tl.int64) * chunks + i_chunk) * D + o_d
    tl.store(grad_gate_ptr + o_sum, b_grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=m_d)
    tl.store(grad_shift_ptr + o_sum, b_grad_shift.to(grad_shift_ptr.dtype.element_ty), mask=m_d)
    tl.store(grad_scale_ptr + o_sum, b_grad_scale.to(grad_scale_ptr.dtype.element_ty), mask=m_d)


def launch_fwd(x, branch, gate, shift, scale, cu_seqlens, rms, eps, out_dtype):
    """Return the new residual (N, D), h (N, D) and the statistics (2, N)."""
    num_rows, width = x.shape
    groups = gate.shape[0]
    settings = row_settings(width)
    x_new = torch.empty_like(x)
    h = torch.empty_like(x, dtype=out_dtype)
    stats = torch.empty(2, num_rows, dtype=torch.float32, device=x.device)
    grid = (groups, num_chunks(num_rows, groups, settings.rows_forward))
    _add_gated_norm_fwd_kernel[grid](
        x,
        branch,
        gate,
        shift,
        scale,
        cu_seqlens,
        x_new,
        h,
        stats,
        num_rows,
        num_rows // max(1, groups),
        gate.stride(0),
        shift.stride(0),
        scale.stride(0),
        eps,
        D=width,
        BLOCK=settings.block,
        PACKED=cu_seqlens is not None,
        RMS=rms,
        num_warps=settings.num_warps,
    )
    return x_new, h, stats


def launch_bwd(grad_new, grad_h, x_new, stats, branch, gate, shift, scale, cu_seqlens, rms, recompute):
    """Return the gradients of x, branch, gate, shift and scale, and the recomputed h (empty unless ``recompute``)."""
    num_rows, width = x_new.shape
    groups = gate.shape[0]
    settings = row_settings(width)
    chunks = num_chunks(num_rows, groups, settings.rows_backward)
    num_warps = settings.num_warps
    if grad_new is None:
        num_warps = _WARPS_WITHOUT_RESIDUAL.get((width, grad_h.element_size()), num_warps)
    grad_x, grad_branch = torch.empty_like(x_new), torch.empty_like(branch)
    sums = partial_sums([gate, shift, scale], chunks)
    h = torch.empty_like(grad_h) if recompute else grad_h.new_empty(0)
    _add_gated_norm_bwd_kernel[(groups, chunks)](
        grad_new,
        grad_h,
        x_new,
        stats,
        branch,
        gate,
        shift,
        scale,
        cu_seqlens,
        grad_x,
        grad_branch,
        *sums,
        h,
        num_rows,
        num_rows // max(1, groups),
        gate.stride(0),
        shift.stride(0),
        scale.stride(0),
        D=width,
        BLOCK=settings.block,
        PACKED=cu_seqlens is not None,
        RMS=rms,
        RESIDUAL=grad_new is not None,
        RECOMPUTE=recompute,
        num_warps=num_warps,
    )
    return grad_x, grad_branch, *finish_sums(sums, [gate, shift, scale]), h
