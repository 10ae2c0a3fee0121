"""Kernels of `embed_kept_patches`: a program owns a tile of kept tokens and reads only the pixels of their patches.

Rows are the concatenated tokens of all samples; each looks up its sample and position, so a tile can span samples. In
forward, the first BLOCK_P values of the patches (all of them in the published network) stay in registers while the
program iterates over the columns of the weight. Tokens are too wide for registers, so for their norm a first pass
computes the statistics and a second pass recomputes the matmul, which is cheap relative to writing tokens and h.

In backward, the weight gradient is the matmul of grad and patches over all rows: each program computes one block of it
over a share of the rows, and the partial sums are added in a fixed order. A pixel belongs to one patch, so the image
gradient is written, not summed. No atomics, so results are deterministic.
"""

import torch
import triton
import triton.language as tl

from fastmask.kernels._layout import sample_of_row
from fastmask.kernels._triton._common import finish_sums, partial_sums

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _add_product(b_left, b_right, b_sum, PRECISION: tl.constexpr):
    """Return left @ right + sum in fp32."""
    if _INTERPRETED:
        # The interpreter stores bfloat16 as integers and would multiply those; fp32 gives the same products.
        b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
    return tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)


@triton.jit
def _row_places(
    ids_ptr,  # (N,), None: row r is position r % keep
    sample_ptr,  # (N,), None: row r is of sample r // keep
    scale_ptr,  # (B,), None: 1
    o_row, m_row, keep, height, width, P: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Return for each row: sample, position, offset of the first pixel of the patch, scale of the image."""
    if sample_ptr is None:
        b_sample = (o_row // keep).to(tl.int64)
    else:
        b_sample = tl.load(sample_ptr + o_row, mask=m_row, other=0).to(tl.int64)
    if ids_ptr is None:
        b_position = o_row % keep
    else:
        b_position = tl.load(ids_ptr + o_row, mask=m_row, other=0).to(tl.int32)
    if scale_ptr is None:
        b_scale = tl.full(o_row.shape, 1.0, tl.float32)
    else:
        b_scale = tl.load(scale_ptr + b_sample, mask=m_row, other=0.0).to(tl.float32)
    columns = width // SIDE
    o_patch = (b_position // columns) * SIDE * width + (b_position % columns) * SIDE
    o_pixel = b_sample * ((P // (SIDE * SIDE)) * height * width) + o_patch
    return b_sample, b_position.to(tl.int64), o_pixel, b_scale


@triton.jit
def _value_pixels(o_p, height, width, SIDE: tl.constexpr):
    """Return the pixel offsets of patch values, in the order (C, p, p) of the weight, from the first pixel."""
    channel, i, j = o_p // (SIDE * SIDE), (o_p // SIDE) % SIDE, o_p % SIDE
    return (channel * height + i) * width + j


@triton.jit
def _load_patches(
    images_ptr, o_pixel, b_scale, m_row, o_p, height, width, P: tl.constexpr, SIDE: tl.constexpr, DTYPE: tl.constexpr
):
    """Return values o_p of the scaled patches of rows, (BLOCK_T, BLOCK_P), rounded to the matmul dtype."""
    o_value = o_pixel[:, None] + _value_pixels(o_p, height, width, SIDE)[None, :]
    b_pixels = tl.load(images_ptr + o_value, mask=m_row[:, None] & (o_p < P)[None, :], other=0.0)
    return (b_pixels.to(tl.float32) * b_scale[:, None]).to(DTYPE)


@triton.jit
def _load_weight(weight_ptr, o_d, o_p, D: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr):
    """Return rows o_d of the weight at values o_p, (BLOCK_D, BLOCK_P), rounded to the matmul dtype."""
    m_weight = (o_d < D)[:, None] & (o_p < P)[None, :]
    return tl.load(weight_ptr + o_d[:, None] * P + o_p[None, :], mask=m_weight, other=0.0).to(DTYPE)


@triton.jit
def _tokens(
    b_patches, images_ptr, weight_ptr, bias_ptr, position_ptr, b_position, o_pixel, b_scale, m_row, o_d, height, width,
    D: tl.constexpr, P: tl.constexpr, SIDE: tl.constexpr, BLOCK_P: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return columns o_d of the tokens, (BLOCK_T, BLOCK_D), in fp32; b_patches are the first BLOCK_P values."""
    o_p = tl.arange(0, BLOCK_P)
    b_weight = _load_weight(weight_ptr, o_d, o_p, D, P, DTYPE)
    b_tokens = _add_product(b_patches, tl.trans(b_weight), None, PRECISION)
    for i_p in range(BLOCK_P, P, BLOCK_P):
        b_more = _load_patches(images_ptr, o_pixel, b_scale, m_row, i_p + o_p, height, width, P, SIDE, DTYPE)
        b_weight = _load_weight(weight_ptr, o_d, i_p + o_p, D, P, DTYPE)
        b_tokens = _add_product(b_more, tl.trans(b_weight), b_tokens, PRECISION)
    m_d = o_d < D
    b_tokens += tl.load(bias_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    o_table = b_position[:, None] * D + o_d[None, :]
    return b_tokens + tl.load(position_ptr + o_table, mask=m_row[:, None] & m_d[None, :], other=0.0).to(tl.float32)


@triton.jit
def _embed_kept_patches_fwd_kernel(
    images_ptr,  # (B, C, height, width)
    weight_ptr,  # (D, P)
    bias_ptr,  # (D,)
    position_ptr,  # (L, D)
    ids_ptr, sample_ptr, image_scale_ptr,  # as in _row_places
    shift_ptr, scale_ptr,  # (B, D) if NORM
    tokens_ptr,  # (N, D)
    h_ptr,  # (N, D) if NORM
    stats_ptr,  # (2, N) if NORM: mean, rstd
    num_rows, keep, height, width, shift_stride, scale_stride, eps,
    D: tl.constexpr, P: tl.constexpr, SIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, NORM: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_row = o_row < num_rows
    b_sample, b_position, o_pixel, b_image_scale = _row_places(
        ids_ptr, sample_ptr, image_scale_ptr, o_row, m_row, keep, height, width, P, SIDE
    )
    o_p = tl.arange(0, BLOCK_P)
    b_patches = _load_patches(images_ptr, o_pixel, b_image_scale, m_row, o_p, height, width, P, SIDE, DTYPE)
    if NORM:
        b_mean = tl.zeros([BLOCK_T], tl.float32)
        b_squares = tl.zeros([BLOCK_T], tl.float32)
        for i_d in range(0, D, BLOCK_D):
            o_d = i_d + tl.arange(0, BLOCK_D)
            b_tokens = _tokens(
                b_patches, images_ptr, weight_ptr, bias_ptr, position_ptr, b_position, o_pixel, b_image_scale, m_row,
                o_d, height, width, D, P, SIDE, BLOCK_P, DTYPE, PRECISION,
            )  # fmt: skip
            # Normalise the rounded tokens, as seen by backward.
            b_tokens = b_tokens.to(tokens_ptr.dtype.element_ty).to(tl.float32)
            if RMS:
                b_squares += tl.sum(b_tokens * b_tokens, 1)
            else:
                # Chan's formula: centre each block by its own mean, then correct for the distance of the means.
                count = tl.sum((o_d < D).to(tl.float32), 0)
                b_block_mean = tl.sum(b_tokens, 1) / count
                b_centred = tl.where((o_d < D)[None, :], b_tokens - b_block_mean[:, None], 0.0)
                b_distance = b_block_mean - b_mean
                b_mean += b_distance * (count / (i_d + count))
                b_squares += tl.sum(b_centred * b_centred, 1) + b_distance * b_distance * (i_d * count / (i_d + count))
        b_rstd = 1.0 / tl.sqrt(b_squares / D + eps)
        tl.store(stats_ptr + o_row, b_mean, mask=m_row)
        tl.store(stats_ptr + num_rows + o_row, b_rstd, mask=m_row)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        b_tokens = _tokens(
            b_patches, images_ptr, weight_ptr, bias_ptr, position_ptr, b_position, o_pixel, b_image_scale, m_row,
            o_d, height, width, D, P, SIDE, BLOCK_P, DTYPE, PRECISION,
        ).to(tokens_ptr.dtype.element_ty)  # fmt: skip
        m_out = m_row[:, None] & (o_d < D)[None, :]
        o_out = o_row.to(tl.int64)[:, None] * D + o_d[None, :]
        tl.store(tokens_ptr + o_out, b_tokens, mask=m_out)
        if NORM:
            o_shift = (b_sample * shift_stride)[:, None] + o_d[None, :]
            o_scale = (b_sample * scale_stride)[:, None] + o_d[None, :]
            b_shift = tl.load(shift_ptr + o_shift, mask=m_out, other=0.0).to(tl.float32)
            b_scale = tl.load(scale_ptr + o_scale, mask=m_out, other=0.0).to(tl.float32)
            b_h = (b_tokens.to(tl.float32) - b_mean[:, None]) * b_rstd[:, None] * (1.0 + b_scale) + b_shift
            tl.store(h_ptr + o_out, b_h.to(h_ptr.dtype.element_ty), mask=m_out)


@triton.jit
def _embed_kept_patches_bwd_kernel(
    grad_ptr,  # (N, D)
    images_ptr,  # (B, C, height, width)
    ids_ptr, sample_ptr, image_scale_ptr,  # as in _row_places
    grad_weight_ptr,  # (splits, D, P)
    grad_bias_ptr,  # (splits, D)
    num_rows, rows_per_split, keep, height, width,
    D: tl.constexpr, P: tl.constexpr, SIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_split = tl.program_id(2)
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    o_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_d, m_p = o_d < D, o_p < P
    b_grad_weight = tl.zeros([BLOCK_D, BLOCK_P], tl.float32)
    b_grad_bias = tl.zeros([BLOCK_D], tl.float32)
    first = i_split * rows_per_split
    end = tl.minimum(first + rows_per_split, num_rows)
    for i_row in range(first, end, BLOCK_T):
        o_row = i_row + tl.arange(0, BLOCK_T)
        m_row = o_row < end
        _, _, o_pixel, b_scale = _row_places(
            ids_ptr, sample_ptr, image_scale_ptr, o_row, m_row, keep, height, width, P, SIDE
        )
        b_patches = _load_patches(images_ptr, o_pixel, b_scale, m_row, o_p, height, width, P, SIDE, DTYPE)
        o_grad = o_row.to(tl.int64)[:, None] * D + o_d[None, :]
        b_grad = tl.load(grad_ptr + o_grad, mask=m_row[:, None] & m_d[None, :], other=0.0)
        b_grad_bias += tl.sum(b_grad.to(tl.float32), 0)
        b_grad_weight = _add_product(tl.trans(b_grad.to(DTYPE)), b_patches, b_grad_weight, PRECISION)
    o_weight = (i_split.to(tl.int64) * D + o_d)[:, None] * P + o_p[None, :]
    b_grad_weight = b_grad_weight.to(grad_weight_ptr.dtype.element_ty)
    tl.store(grad_weight_ptr + o_weight, b_grad_weight, mask=m_d[:, None] & m_p[None, :])
    if tl.program_id(1) == 0:
        b_grad_bias = b_grad_bias.to(grad_bias_ptr.dtype.element_ty)
        tl.store(grad_bias_ptr + i_split.to(tl.int64) * D + o_d, b_grad_bias, mask=m_d)


@triton.jit
def _embed_kept_patches_bwd_images_kernel(
    grad_ptr,  # (N, D)
    weight_ptr,  # (D, P)
    ids_ptr, sample_ptr, image_scale_ptr,  # as in _row_places
    grad_images_ptr,  # (B, C, height, width), zero
    num_rows, keep, height, width,
    D: tl.constexpr, P: tl.constexpr, SIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_row = o_row < num_rows
    _, _, o_pixel, b_scale = _row_places(
        ids_ptr, sample_ptr, image_scale_ptr, o_row, m_row, keep, height, width, P, SIDE
    )
    b_grad_patches = tl.zeros([BLOCK_T, BLOCK_P], tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        o_grad = o_row.to(tl.int64)[:, None] * D + o_d[None, :]
        b_grad = tl.load(grad_ptr + o_grad, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0).to(DTYPE)
        b_weight = _load_weight(weight_ptr, o_d, o_p, D, P, DTYPE)
        b_grad_patches = _add_product(b_grad, b_weight, b_grad_patches, PRECISION)
    o_value = o_pixel[:, None] + _value_pixels(o_p, height, width, SIDE)[None, :]
    b_grad_patches = (b_grad_patches * b_scale[:, None]).to(grad_images_ptr.dtype.element_ty)
    tl.store(grad_images_ptr + o_value, b_grad_patches, mask=m_row[:, None] & (o_p < P)[None, :])


_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def settings(weight, dtype, norm=False):
    """Return the launch constants: sizes, block sizes of tokens, columns and patch values, matmul precision."""
    width = weight.shape[0]
    values = weight.numel() // width
    # Larger blocks would spill: exact fp32 matmuls are unrolled, and the norm has three of them.
    most_values = 16 if dtype == torch.float32 or norm else 32
    return {
        "D": width,
        "P": values,
        "SIDE": weight.shape[-1],
        "BLOCK_T": 32,
        "BLOCK_D": min(128, max(16, triton.next_power_of_2(width))),
        "BLOCK_P": min(most_values, max(16, triton.next_power_of_2(values))),
        "DTYPE": _DTYPES[dtype],
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "num_warps": 4,
    }


def row_arguments(images, weight, ids_keep, cu_seqlens):
    """Return N, the rows per sample (dense) and the sample of each row (packed)."""
    if cu_seqlens is not None:
        num_rows = ids_keep.shape[0]
        return num_rows, 0, sample_of_row(cu_seqlens, num_rows).int()
    length = images.shape[2] * images.shape[3] // weight.shape[-1] ** 2
    keep = length if ids_keep is None else ids_keep.shape[1]
    return images.shape[0] * keep, keep, None


def launch_fwd(
    images, weight, bias, position, ids_keep, image_scale, cu_seqlens, dtype, out_dtype, shift, scale, rms, eps
):
    """Return tokens (N, D), and with a modulation h (N, D) and its statistics (2, N), else two empty tensors."""
    norm = shift is not None
    # In float16, four warps would spill at width 384, and a third stage with the norm at width 1152.
    constants = settings(weight, dtype, norm) | {"num_warps": 8} | ({"num_stages": 2} if norm else {})
    num_rows, keep, sample = row_arguments(images, weight, ids_keep, cu_seqlens)
    tokens = torch.empty(num_rows, weight.shape[0], dtype=out_dtype, device=images.device)
    h = torch.empty_like(tokens) if norm else tokens.new_empty(0)
    stats = torch.empty((2, num_rows) if norm else 0, dtype=torch.float32, device=images.device)
    _embed_kept_patches_fwd_kernel[(triton.cdiv(num_rows, constants["BLOCK_T"]),)](
        images, weight, bias, position, ids_keep, sample, image_scale, shift, scale, tokens, h, stats,
        num_rows, keep, *images.shape[2:], shift.stride(0) if norm else 0, scale.stride(0) if norm else 0, eps,
        NORM=norm, RMS=rms, **constants,
    )  # fmt: skip
    return tokens, h, stats


def launch_bwd(grad, images, weight, ids_keep, image_scale, cu_seqlens, dtype, bias_dtype):
    """Return the gradients of weight and bias; partial sums are added in a fixed order."""
    constants = settings(weight, dtype)
    num_rows, keep, sample = row_arguments(images, weight, ids_keep, cu_seqlens)
    blocks = triton.cdiv(constants["D"], constants["BLOCK_D"]), triton.cdiv(constants["P"], constants["BLOCK_P"])
    # Enough programs to fill a GPU, each with enough rows to amortise its partial sum.
    splits = max(1, min(triton.cdiv(num_rows, 256), triton.cdiv(256, blocks[0] * blocks[1])))
    rows_per_split = triton.cdiv(triton.cdiv(num_rows, splits), constants["BLOCK_T"]) * constants["BLOCK_T"]
    like = [weight.view(1, -1)], [weight.new_empty((1, constants["D"]), dtype=bias_dtype)]
    sums = [partial_sums(each, splits) for each in like]
    _embed_kept_patches_bwd_kernel[(*blocks, splits)](
        grad, images, ids_keep, sample, image_scale, sums[0][0], sums[1][0],
        num_rows, rows_per_split, keep, *images.shape[2:], **constants,
    )  # fmt: skip
    grad_weight, grad_bias = (finish_sums(*each)[0] for each in zip(sums, like, strict=True))
    return grad_weight.view(weight.shape), grad_bias.view(-1)


def launch_bwd_images(grad, images, weight, ids_keep, image_scale, cu_seqlens, dtype):
    """Return the gradient of the images, zero in dropped patches."""
    constants = settings(weight, dtype)
    num_rows, keep, sample = row_arguments(images, weight, ids_keep, cu_seqlens)
    grad_images = torch.zeros_like(images)
    blocks = triton.cdiv(num_rows, constants["BLOCK_T"]), triton.cdiv(constants["P"], constants["BLOCK_P"])
    _embed_kept_patches_bwd_images_kernel[blocks](
        grad, weight, ids_keep, sample, image_scale, grad_images, num_rows, keep, *images.shape[2:], **constants
    )
    return grad_images
