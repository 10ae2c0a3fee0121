"""Kernel of `adamw_ema`: one launch for a list of tensors.

A table on the device holds, for each tensor, the cumulative number of chunks, its size, and the distances of its arrays
from a base address (the first parameter). A program looks up its tensor and updates one chunk, so many small tensors
need no extra launches, and gradients are not copied.
"""

import collections
import itertools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

_BLOCK = 1024
_CHUNK = 8 * _BLOCK
_NUM_WARPS = 4


@triton.jit
def _array(base_ptr, table_ptr, i_row, num_tensors, i_tensor, start, UNIT: tl.constexpr):
    """Return the pointer to a chunk of an array; the offset is visibly a multiple of UNIT values, for vector loads."""
    return base_ptr + tl.load(table_ptr + i_row * num_tensors + i_tensor) * UNIT + start


@triton.jit
def _adamw_ema_kernel(
    base_ptr,
    copy_base_ptr,
    table_ptr,  # (6 + averages, T), one more row with copies: chunk ends, sizes, distances in units
    scalars_ptr,  # (T, 2): lr / (1 - beta1^t) and sqrt(1 - beta2^t)
    lr_ptr,
    rates_ptr,  # (AVERAGES,)
    factor_ptr,
    found_inf_ptr,
    num_tensors,
    beta1,
    beta2,
    rest1,  # 1 - beta1, which is inexact in fp32
    rest2,
    eps,
    weight_decay,
    AVERAGES: tl.constexpr,
    UNIT: tl.constexpr,  # in fp32 values
    LANES: tl.constexpr,  # at least num_tensors
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Look up the tensor of this chunk in the table.
    o_tensor = tl.arange(0, LANES)
    i_chunk = tl.program_id(0)
    b_ends = tl.load(table_ptr + o_tensor, mask=o_tensor < num_tensors, other=0)
    m_done = (b_ends <= i_chunk) & (o_tensor < num_tensors)
    i_tensor = tl.sum(m_done.to(tl.int32), 0)
    start = (i_chunk - tl.max(tl.where(m_done, b_ends, 0), 0)) * CHUNK
    length = tl.minimum(tl.load(table_ptr + num_tensors + i_tensor) - start, CHUNK)
    if found_inf_ptr is not None:
        length = tl.where(tl.load(found_inf_ptr) == 0, length, 0)
    length = tl.multiple_of(length, UNIT)

    param_ptr = _array(base_ptr, table_ptr, 2, num_tensors, i_tensor, start, UNIT)
    grad_ptr = _array(base_ptr, table_ptr, 3, num_tensors, i_tensor, start, UNIT)
    exp_avg_ptr = _array(base_ptr, table_ptr, 4, num_tensors, i_tensor, start, UNIT)
    exp_avg_sq_ptr = _array(base_ptr, table_ptr, 5, num_tensors, i_tensor, start, UNIT)
    step_size = tl.load(scalars_ptr + 2 * i_tensor)
    correction = tl.load(scalars_ptr + 2 * i_tensor + 1)
    shrink = tl.load(lr_ptr) * weight_decay
    factor = 1.0
    if factor_ptr is not None:
        factor = tl.load(factor_ptr)

    # AdamW, then the EMAs and the copy, from registers.
    for offset in range(0, length, BLOCK):
        o_x = offset + tl.arange(0, BLOCK)
        m_x = o_x < length
        b_param = tl.load(param_ptr + o_x, mask=m_x, other=0.0)
        b_grad = tl.load(grad_ptr + o_x, mask=m_x, other=0.0) * factor
        b_m = beta1 * tl.load(exp_avg_ptr + o_x, mask=m_x, other=0.0) + rest1 * b_grad
        b_v = beta2 * tl.load(exp_avg_sq_ptr + o_x, mask=m_x, other=0.0) + rest2 * b_grad * b_grad
        b_deviation = tl.math.div_rn(tl.math.sqrt_rn(b_v), correction) + eps
        b_param = b_param - shrink * b_param - step_size * tl.math.div_rn(b_m, b_deviation)
        tl.store(param_ptr + o_x, b_param, mask=m_x)
        tl.store(exp_avg_ptr + o_x, b_m, mask=m_x)
        tl.store(exp_avg_sq_ptr + o_x, b_v, mask=m_x)
        for j in tl.static_range(AVERAGES):
            average_ptr = _array(base_ptr, table_ptr, 6 + j, num_tensors, i_tensor, start, UNIT)
            b_average = tl.load(average_ptr + o_x, mask=m_x, other=0.0)
            tl.store(average_ptr + o_x, b_average + tl.load(rates_ptr + j) * (b_param - b_average), mask=m_x)
        if copy_base_ptr is not None:
            i_row = 6 + AVERAGES
            copy_ptr = _array(copy_base_ptr, table_ptr, i_row, num_tensors, i_tensor, start, UNIT)
            tl.store(copy_ptr + o_x, b_param.to(copy_base_ptr.dtype.element_ty), mask=m_x)


def launch(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    averages,
    copies,
    steps,
    lr,
    rates,
    factor,
    found_inf,
    beta1,
    beta2,
    eps,
    weight_decay,
):
    """Update tensors in place; ``averages`` is the concatenation of the tensor lists of all EMAs."""
    count = len(params)
    arrays = [params, grads, exp_avgs, exp_avg_sqs]
    arrays += [averages[k * count : (k + 1) * count] for k in range(len(rates))]
    if copies:
        arrays.append(copies)
    # In float64, since 1 - beta2^t is a small difference, and on the device, like the step counts.
    t = torch.stack(steps).double()
    scalars = torch.stack([lr / (1 - beta1**t), (1 - beta2**t).sqrt()], 1).float()
    for group in _groups(arrays, lr.device):
        first, index = group.first, group.index
        _adamw_ema_kernel[(group.chunks,)](
            params[first],
            copies[first] if copies else None,
            group.table,
            scalars if index is None else scalars.index_select(0, index),
            lr,
            rates,
            factor,
            found_inf,
            group.count,
            beta1,
            beta2,
            1 - beta1,
            1 - beta2,
            eps,
            weight_decay,
            AVERAGES=len(rates),
            UNIT=group.unit,
            LANES=triton.next_power_of_2(group.count),
            CHUNK=_CHUNK,
            BLOCK=_BLOCK,
            num_warps=_NUM_WARPS,
        )


class _Group(NamedTuple):
    """Tensors updated by one launch: those with 128-bit alignment, or the others."""

    first: int  # index of the tensor whose parameter is the base address
    count: int
    index: torch.Tensor | None  # indices of the tensors; None for all
    chunks: int
    unit: int
    table: torch.Tensor


_KEPT = 8  # number of cached tables of eager calls
_recent: collections.OrderedDict[Any, list[_Group]] = collections.OrderedDict()
# Captured graphs read their table at every replay. One table per set of addresses, about ten kilobytes.
_captured: dict[Any, list[_Group]] = {}


def _groups(arrays, device):
    """Return the launches for lists of tensors, with tables on the device.

    A table goes through pinned memory, whose later fate a CUDA graph would have to know. So a capture takes the table
    that an earlier call with the same tensors has made, and holds no copy.
    """
    key = device, tuple(tuple(t.data_ptr() for t in tensors) for tensors in arrays), tuple(t.numel() for t in arrays[0])
    groups = _captured.get(key) or _recent.get(key)
    capturing = _captures(device)
    if groups is None:
        if capturing:
            raise RuntimeError("adamw_ema must be called once with the same tensors before a CUDA graph captures it")
        groups = _make_groups(arrays, *key)
    if capturing:
        _captured[key] = groups
    _recent[key] = groups
    _recent.move_to_end(key)
    if len(_recent) > _KEPT:
        _recent.popitem(last=False)
    return groups


def _captures(device):
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _make_groups(arrays, device, addresses, sizes):
    groups = []
    for aligned, index in _by_alignment(sizes, addresses).items():
        unit = 4 if aligned else 1
        ends = list(itertools.accumulate(-(-sizes[i] // _CHUNK) for i in index))
        first = index[0]
        distances = []
        for tensors, row in zip(arrays, addresses, strict=True):
            size = tensors[first].element_size()
            base = row[first] if size == 2 else addresses[0][first]  # 16-bit copies have their own base
            distances.append([(row[i] - base) // (unit * size) for i in index])
        table = _on_device([ends, [sizes[i] for i in index], *distances], device)
        some = _on_device(index, device) if len(index) < len(sizes) else None
        groups.append(_Group(first, len(index), some, ends[-1], unit, table))
    return groups


def _by_alignment(sizes, addresses):
    """Return the indices of tensors with and without 128-bit alignment; empty tensors are skipped."""
    groups = {}
    for i, (size, *mine) in enumerate(zip(sizes, *addresses, strict=True)):
        if size:
            groups.setdefault(math.gcd(4 * size, *mine) % 16 == 0, []).append(i)
    return groups


def _on_device(values, device):
    """Copy integers to a device without a host sync."""
    return torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
