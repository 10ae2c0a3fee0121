"""Kernel of `sample_mask`: a program draws the mask of one sample, with the keys of all L positions in registers.

A mask needs no sort, only the K-th smallest key, which is found by a bitwise search from the top: a bit stays set if
fewer than K keys are below the candidate. A cumulative sum over the kept positions then gives both index lists, sorted
by position. The kernel reads only the seed and the offset (and cu_seqlens), and writes each list once.

K and L are not specialised: a mask ratio schedule would compile kernels for K = 1 and for each divisibility, and vector
stores of ids_restore would make Triton keep every block in a second layout.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def random_keys(seed, sample, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    """Return the Philox words of the first BLOCK positions of a sample, uint32; four neighbours share a counter."""
    o_counter = tl.arange(0, BLOCK // 4).to(tl.uint32)
    low, high = sample.to(tl.uint32), (sample >> 32).to(tl.uint32)
    b_0, b_1, b_2, b_3 = tl.philox(seed, o_counter, low, high, tl.cast(STREAM, tl.uint32))
    return tl.interleave(tl.interleave(b_0, b_2), tl.interleave(b_1, b_3))


@triton.jit
def keep_smallest(b_key, num_kept):
    """Return the mask of the ``num_kept`` smallest keys (uint32), with ties broken by position."""
    kth_key = tl.cast(0, tl.uint32)
    for i_bit in range(32):
        candidate = kth_key | (tl.cast(1, tl.uint32) << (31 - i_bit))
        num_below = tl.sum((b_key < candidate).to(tl.int32), 0)
        kth_key = tl.where(num_below < num_kept, candidate, kth_key)
    m_below, m_equal = b_key < kth_key, b_key == kth_key
    num_ties = num_kept - tl.sum(m_below.to(tl.int32), 0)
    return m_below | (m_equal & (tl.cumsum(m_equal.to(tl.int32), 0) <= num_ties))


@triton.jit(do_not_specialize=["keep", "length"])
def _sample_mask_fwd_kernel(
    seed_ptr,  # ()
    offset_ptr,  # ()
    cu_seqlens_ptr,  # (B + 1,) if PACKED
    ids_keep_ptr,  # (B, K), or (N,) if PACKED
    ids_restore_ptr,  # (B, L)
    keep,  # K, or N if PACKED
    length,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
):
    i_sample = tl.program_id(0).to(tl.int64)
    o_l = tl.arange(0, BLOCK)
    m_l = o_l < length
    if PACKED:
        first = tl.load(cu_seqlens_ptr + i_sample).to(tl.int64)
        num_kept = (tl.load(cu_seqlens_ptr + i_sample + 1) - first).to(tl.int32)
        # Counts that sum to more than N must not write past the end of the list.
        num_rows = tl.minimum(num_kept, (keep - first).to(tl.int32))
    else:
        first = i_sample * keep
        num_kept = tl.cast(keep, tl.int32)
        num_rows = num_kept
    b_key = random_keys(tl.load(seed_ptr), tl.load(offset_ptr) + i_sample, STREAM, BLOCK)
    # Lanes beyond L have the largest key and lose ties, so they are never kept.
    m_kept = keep_smallest(tl.where(m_l, b_key, 0xFFFFFFFF), num_kept)
    b_count = tl.cumsum(m_kept.to(tl.int32), 0)
    tl.store(ids_keep_ptr + first + (b_count - 1), o_l, mask=m_kept & (b_count <= num_rows))
    b_restore = tl.where(m_kept, b_count - 1, num_kept + o_l - b_count)
    tl.store(ids_restore_ptr + i_sample * length + o_l, b_restore, mask=m_l)


def _config(length):
    """Return lanes and warps for L positions: at least four lanes (the words of a counter), 16 keys per thread."""
    block = max(4, triton.next_power_of_2(length))
    return block, min(32, max(1, block // 512))


def launch_fwd(seed, offset, cu_seqlens, batch, length, keep, stream):
    """Return ids_keep, (B, K) or (N,), and ids_restore (B, L), int32."""
    block, num_warps = _config(length)
    shape = (batch, keep) if cu_seqlens is None else (keep,)
    ids_keep = torch.empty(shape, dtype=torch.int32, device=seed.device)
    ids_restore = torch.empty(batch, length, dtype=torch.int32, device=seed.device)
    _sample_mask_fwd_kernel[(batch,)](
        seed,
        offset,
        cu_seqlens,
        ids_keep,
        ids_restore,
        keep,
        length,
        STREAM=stream,
        BLOCK=block,
        PACKED=cu_seqlens is not None,
        num_warps=num_warps,
    )
    return ids_keep, ids_restore
