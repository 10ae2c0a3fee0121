"""Kernels of `masked_loss`: a program owns a tile of positions of one sample, with all values of their patches.

Raw tokens, images and noised images are read once, as (positions, values): the pixel address of a value is computed
from its position and index, so no patches are materialised. Patch statistics are sums along rows of the tile.
Each program writes one fp32 partial sum per loss, and these are added in a fixed order. No atomics, so results are
deterministic.
"""

import torch
import triton
import triton.language as tl

from fastmask.kernels._triton._common import finish_sums, partial_sums
from fastmask.kernels.masked_loss import EPS

# Values per tile, 16 per thread: three inputs and the error of each value stay in registers. A 32x32 latent with p = 2
# is one tile.
TILE_VALUES = 4096
NUM_WARPS = 8


@triton.jit
def _tile_errors(
    raw_ptr,
    images_ptr,
    noised_ptr,
    c_skip_ptr,
    c_out_ptr,
    weight_ptr,
    ids_restore_ptr,
    cu_seqlens_ptr,
    num_kept,
    length,
    grid_width,
    eps,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Return, for a tile: denoised minus target, 0 outside; the mask of kept positions; the loss weights of squared
    errors at kept and dropped positions; c_out; the offsets into raw and their mask.
    """
    P: tl.constexpr = PATCH * PATCH * CHANNELS
    i_sample = tl.program_id(0).to(tl.int64)
    o_l = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    o_p = tl.arange(0, BLOCK_P)
    m_l = o_l < length
    m_tile = m_l[:, None] & (o_p < P)[None, :]
    o_raw = i_sample * length * P + o_l[:, None] * P + o_p[None, :]
    # Offset of the first pixel of a patch, then of value (row, column, channel) relative to it.
    o_patch = (o_l // grid_width * PATCH * grid_width + o_l % grid_width) * PATCH
    o_value = (
        o_p % CHANNELS * (length * PATCH * PATCH)
        + o_p // (PATCH * CHANNELS) * (grid_width * PATCH)
        + o_p // CHANNELS % PATCH
    )
    o_pixel = i_sample * length * P + o_patch[:, None] + o_value[None, :]

    c_skip = tl.load(c_skip_ptr + i_sample)
    c_out = tl.load(c_out_ptr + i_sample)
    weight = tl.load(weight_ptr + i_sample)

    # The target is the image at kept positions, the normalised noised patch at dropped ones.
    b_raw = tl.load(raw_ptr + o_raw, mask=m_tile, other=0.0).to(tl.float32)
    b_noised = tl.load(noised_ptr + o_pixel, mask=m_tile, other=0.0).to(tl.float32)
    b_target = tl.load(images_ptr + o_pixel, mask=m_tile, other=0.0).to(tl.float32)
    kept = num_kept
    m_kept = m_l
    if MASKED:
        if PACKED:
            kept = tl.load(cu_seqlens_ptr + i_sample + 1).to(tl.int32) - tl.load(cu_seqlens_ptr + i_sample).to(tl.int32)
        b_restore = tl.load(ids_restore_ptr + i_sample * length + o_l, mask=m_l, other=0)
        m_kept = m_l & (b_restore < kept)
        mean = tl.sum(b_noised, 1) / P
        b_centred = tl.where(m_tile, b_noised - mean[:, None], 0.0)
        deviation = tl.sqrt(tl.sum(b_centred * b_centred, 1) / (P - 1) + eps)
        b_target = tl.where(m_kept[:, None], b_target, b_centred / deviation[:, None])
    b_error = c_skip * b_noised + c_out * b_raw - b_target
    share_kept = tl.div_rn(weight, (P * tl.maximum(kept, 1)).to(tl.float32))
    share_dropped = tl.div_rn(1.0, (P * tl.maximum(length - kept, 1)).to(tl.float32))
    return b_error, m_kept, share_kept, share_dropped, c_out, o_raw, m_tile


@triton.jit(do_not_specialize=["num_kept"])
def _masked_loss_fwd_kernel(
    raw_ptr,  # (B, L, P)
    images_ptr,  # (B, C, h * p, w * p)
    noised_ptr,  # (B, C, h * p, w * p)
    c_skip_ptr,  # (B,)
    c_out_ptr,  # (B,)
    weight_ptr,  # (B,)
    ids_restore_ptr,  # (B, L) if MASKED
    cu_seqlens_ptr,  # (B + 1,) if PACKED
    denoising_ptr,  # (B, chunks)
    reconstruction_ptr,  # (B, chunks)
    num_kept,  # K unless PACKED
    length,
    grid_width,
    eps,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
):
    b_error, m_kept, share_kept, share_dropped, _, _, _ = _tile_errors(
        raw_ptr,
        images_ptr,
        noised_ptr,
        c_skip_ptr,
        c_out_ptr,
        weight_ptr,
        ids_restore_ptr,
        cu_seqlens_ptr,
        num_kept,
        length,
        grid_width,
        eps,
        PATCH,
        CHANNELS,
        BLOCK_L,
        BLOCK_P,
        MASKED,
        PACKED,
    )
    b_squared = tl.sum(b_error * b_error, 1)
    o_sum = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(denoising_ptr + o_sum, tl.sum(tl.where(m_kept, b_squared, 0.0), 0) * share_kept)
    tl.store(reconstruction_ptr + o_sum, tl.sum(tl.where(m_kept, 0.0, b_squared), 0) * share_dropped)


@triton.jit(do_not_specialize=["num_kept"])
def _masked_loss_bwd_kernel(
    grad_denoising_ptr,  # (B,)
    grad_reconstruction_ptr,  # (B,)
    raw_ptr,  # (B, L, P)
    images_ptr,  # (B, C, h * p, w * p)
    noised_ptr,  # (B, C, h * p, w * p)
    c_skip_ptr,  # (B,)
    c_out_ptr,  # (B,)
    weight_ptr,  # (B,)
    ids_restore_ptr,  # (B, L) if MASKED
    cu_seqlens_ptr,  # (B + 1,) if PACKED
    grad_raw_ptr,  # (B, L, P)
    num_kept,  # K unless PACKED
    length,
    grid_width,
    eps,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
):
    b_error, m_kept, share_kept, share_dropped, c_out, o_raw, m_tile = _tile_errors(
        raw_ptr,
        images_ptr,
        noised_ptr,
        c_skip_ptr,
        c_out_ptr,
        weight_ptr,
        ids_restore_ptr,
        cu_seqlens_ptr,
        num_kept,
        length,
        grid_width,
        eps,
        PATCH,
        CHANNELS,
        BLOCK_L,
        BLOCK_P,
        MASKED,
        PACKED,
    )
    factor_kept = 2.0 * c_out * share_kept * tl.load(grad_denoising_ptr + tl.program_id(0))
    factor_dropped = 2.0 * c_out * share_dropped * tl.load(grad_reconstruction_ptr + tl.program_id(0))
    b_grad_raw = tl.where(m_kept, factor_kept, factor_dropped)[:, None] * b_error
    tl.store(grad_raw_ptr + o_raw, b_grad_raw.to(grad_raw_ptr.dtype.element_ty), mask=m_tile)


def launch_fwd(raw, images, noised, c_skip, c_out, weight, ids_restore, cu_seqlens, num_kept, patch_size):
    """Return the denoising and the reconstruction loss, each (B,)."""
    grid, sizes, settings = _launch(images, patch_size)
    per_sample = [weight[:, None], weight[:, None]]
    sums = partial_sums(per_sample, grid[1])
    _masked_loss_fwd_kernel[grid](
        raw,
        images,
        noised,
        c_skip,
        c_out,
        weight,
        ids_restore,
        cu_seqlens,
        *sums,
        num_kept,
        *sizes,
        EPS,
        MASKED=ids_restore is not None,
        PACKED=cu_seqlens is not None,
        **settings,
    )
    denoising, reconstruction = finish_sums(sums, per_sample)
    return denoising.view(-1), reconstruction.view(-1)


def launch_bwd(
    grad_denoising,
    grad_reconstruction,
    raw,
    images,
    noised,
    c_skip,
    c_out,
    weight,
    ids_restore,
    cu_seqlens,
    num_kept,
    patch_size,
):
    """Return the gradient of raw (B, L, P)."""
    grid, sizes, settings = _launch(images, patch_size)
    grad_raw = torch.empty_like(raw)
    _masked_loss_bwd_kernel[grid](
        grad_denoising,
        grad_reconstruction,
        raw,
        images,
        noised,
        c_skip,
        c_out,
        weight,
        ids_restore,
        cu_seqlens,
        grad_raw,
        num_kept,
        *sizes,
        EPS,
        MASKED=ids_restore is not None,
        PACKED=cu_seqlens is not None,
        **settings,
    )
    return grad_raw


def _launch(images, patch_size):
    """Return the grid, the sizes L and w, and the launch settings."""
    batch, channels, height, width = images.shape
    grid_width = width // patch_size
    length = height // patch_size * grid_width
    block_p = triton.next_power_of_2(patch_size * patch_size * channels)
    block_l = min(TILE_VALUES // block_p, triton.next_power_of_2(length))
    settings = {
        "PATCH": patch_size,
        "CHANNELS": channels,
        "BLOCK_L": block_l,
        "BLOCK_P": block_p,
        "num_warps": max(1, NUM_WARPS * block_l * block_p // TILE_VALUES),
    }
    return (batch, triton.cdiv(length, block_l)), (length, grid_width), settings
