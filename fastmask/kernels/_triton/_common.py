"""Shared code of the Triton kernels: launch settings, partial sums, norm statistics.

Names inside kernels: `i_` index, `o_` offsets, `m_` mask, `b_` block of values in registers; pointers end in `_ptr`.
Row indices are converted to int64 before multiplication; offsets within a row are int32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

_MAX_CHUNKS = 65535  # limit of the second grid axis


class RowSettings(NamedTuple):
    """Launch settings of kernels whose programs iterate over the rows of a group.

    Attributes:
        block: lanes per row: the width rounded up to a power of two.
        num_warps: warps per program.
        rows_forward: rows per program in forward.
        rows_backward: rows per program in backward; each program writes one partial sum of the modulation gradients.
    """

    block: int
    num_warps: int
    rows_forward: int
    rows_backward: int


# Widths for which eight lanes per thread would spill two registers on sm_80.
_NUM_WARPS = {384: 1, 768: 2}


def row_settings(width: int) -> RowSettings:
    """Return launch settings for a row width: eight lanes per thread, which leaves registers for four sums."""
    block = triton.next_power_of_2(width)
    return RowSettings(block, _NUM_WARPS.get(width, min(16, max(1, block // 256))), 16, 32)


def num_chunks(num_rows: int, num_groups: int, rows: int) -> int:
    """Return the number of programs per group, each with about ``rows`` rows."""
    return min(_MAX_CHUNKS, max(1, triton.cdiv(num_rows, max(1, num_groups) * rows)))


def partial_sums(like: list[torch.Tensor], chunks: int) -> list[torch.Tensor]:
    """Allocate the partial sums of a backward kernel: (G, chunks, D) for each (G, D) result.

    With one program per group the sum is the result, in its dtype. Otherwise partial sums are fp32, and `finish_sums`
    adds them in a fixed order.
    """
    if chunks == 1:
        return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in like]
    groups, width = like[0].shape
    return list(torch.empty(len(like), groups, chunks, width, dtype=torch.float32, device=like[0].device))


def finish_sums(partial: list[torch.Tensor], like: list[torch.Tensor]) -> list[torch.Tensor]:
    """Reduce the buffers of `partial_sums` to the results."""
    if partial[0].ndim == 2:
        return partial
    return [total.to(t.dtype) for total, t in zip((p.sum(1) for p in partial), like, strict=True)]


@triton.jit
def group_rows(cu_seqlens_ptr, rows_per_group, i_group, i_chunk, chunks, PACKED: tl.constexpr):
    """Return the first and end row of a chunk of a group; a chunk can be empty."""
    if PACKED:
        first = tl.load(cu_seqlens_ptr + i_group).to(tl.int64)
        count = tl.load(cu_seqlens_ptr + i_group + 1).to(tl.int64) - first
    else:
        first = i_group.to(tl.int64) * rows_per_group
        count = tl.full([], rows_per_group, tl.int64)  # Triton specialises an argument of 1 to a constant
    size = (count + chunks - 1) // chunks
    start = first + i_chunk * size
    return start, tl.minimum(start + size, first + count)


@triton.jit
def row_statistics(b_x, m_d, eps, D: tl.constexpr, RMS: tl.constexpr):
    """Return mean and rstd of a row of D values, in two passes over registers; the mean is 0 for RMS."""
    if RMS:
        mean = 0.0
    else:
        mean = tl.sum(b_x, 0) / D
    centred = tl.where(m_d, b_x - mean, 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)


@triton.jit
def norm_gradient(b_g, b_xhat, rstd, D: tl.constexpr, RMS: tl.constexpr):
    """Backward of a row's norm with gradient g: rstd (g - mean(g) - xhat mean(g xhat)); RMS: without mean(g)."""
    projection = tl.sum(b_g * b_xhat, 0) / D
    if RMS:
        return rstd * (b_g - b_xhat * projection)
    return rstd * (b_g - tl.sum(b_g, 0) / D - b_xhat * projection)
