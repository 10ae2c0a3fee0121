"""MaskDiT's two losses in token space (arXiv 2306.09305, equations 3 to 5), for any affine diffusion process.

With the denoised patch d = c_skip * noised + c_out * raw and a weight per sample:

    denoising      = mean over kept patches of    weight * mean over the patch of (d - image)^2
    reconstruction = mean over dropped patches of mean over the patch of (d - normed)^2
    normed         = (noised - mean) / sqrt(var + 1e-6), per patch, var unbiased

c_skip, c_out and weight are coefficients of the process at the sample's time: for EDM (arXiv 2206.00364, table 1)
sd^2 / (sigma^2 + sd^2), sigma * sd / sqrt(sigma^2 + sd^2) and 1 / c_out^2, for rectified flow 1, -t and 1 / t^2.
Each mean is over the K kept or L - K dropped patches of a sample. With the gradients g of the two losses, backward is

    grad_raw = 2 * c_out * (d - image)  * g_denoising * weight / (K * P)         in a kept patch
    grad_raw = 2 * c_out * (d - normed) * g_reconstruction / ((L - K) * P)       in a dropped one

so only the inputs are kept. All computation is in fp32. Memory traffic per value: raw, images and noised forward; these
and grad_raw backward.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmask.kernels._dispatch import Impl, define_op, public_op, resolve_impl
from fastmask.kernels._layout import (
    check_bounds,
    check_cu_seqlens,
    check_devices,
    check_dtype,
    check_tensors,
    is_supported,
    needs_gradient,
)
from fastmask.kernels.patches import patchify
from fastmask.kernels.sample_mask import Mask

MAX_VALUES = 1024
EPS = 1e-6


def masked_loss_reference(
    raw: Tensor,
    images: Tensor,
    noised: Tensor,
    c_skip: Tensor,
    c_out: Tensor,
    weight: Tensor,
    mask: Mask | None,
    *,
    patch_size: int,
) -> tuple[Tensor, Tensor]:
    """Reference for `masked_loss` in plain PyTorch; same arguments, any floating dtype and patch size."""
    compute = torch.promote_types(raw.dtype, torch.float32)
    images = patchify(images, patch_size).to(compute)  # (B, L, P)
    noised = patchify(noised, patch_size).to(compute)
    c_skip, c_out, weight = (c.to(compute)[:, None, None] for c in (c_skip, c_out, weight))
    denoised = c_skip * noised + c_out * raw.to(compute)

    squared = (weight * (denoised - images).square()).mean(-1)  # (B, L)
    if mask is None:
        return squared.mean(1), torch.zeros_like(squared[:, 0])

    var, mean = torch.var_mean(noised, dim=-1, keepdim=True)
    normed = (noised - mean) / (var + EPS).sqrt()
    reconstruction = (denoised - normed).square().mean(-1)
    dropped = mask.dropped
    return _mean_where(~dropped, squared), _mean_where(dropped, reconstruction)


def _mean_where(chosen: Tensor, values: Tensor) -> Tensor:
    """Return the mean of the chosen values of each row, 0 if there are none."""
    return values.masked_fill(~chosen, 0).sum(1) / chosen.sum(1).clamp(min=1)


def _fwd_fake(
    raw: Tensor,
    images: Tensor,
    noised: Tensor,
    c_skip: Tensor,
    c_out: Tensor,
    weight: Tensor,
    ids_restore: Tensor | None,
    cu_seqlens: Tensor | None,
    num_kept: int,
    patch_size: int,
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _bwd_fake(
    grad_denoising: Tensor,
    grad_reconstruction: Tensor,
    raw: Tensor,
    images: Tensor,
    noised: Tensor,
    c_skip: Tensor,
    c_out: Tensor,
    weight: Tensor,
    ids_restore: Tensor | None,
    cu_seqlens: Tensor | None,
    num_kept: int,
    patch_size: int,
) -> Tensor:
    return torch.empty_like(raw)


def _native(raw: Tensor, images: Tensor, noised: Tensor, *coefficients: Tensor) -> bool:
    return (
        raw.shape[2] <= MAX_VALUES
        and all(is_supported(tensor.dtype) for tensor in (raw, images, noised))
        and all(tensor.dtype == torch.float32 for tensor in coefficients)
        and not needs_gradient(images, noised, *coefficients)
    )


masked_loss_fwd = define_op(
    "masked_loss_fwd(Tensor raw, Tensor images, Tensor noised, Tensor c_skip, Tensor c_out, Tensor weight, "
    "Tensor? ids_restore, Tensor? cu_seqlens, SymInt num_kept, SymInt patch_size) -> (Tensor, Tensor)",
    fake=_fwd_fake,
    launcher="masked_loss:launch_fwd",
    native=_native,
)
masked_loss_bwd = define_op(
    "masked_loss_bwd(Tensor grad_denoising, Tensor grad_reconstruction, Tensor raw, Tensor images, Tensor noised, "
    "Tensor c_skip, Tensor c_out, Tensor weight, Tensor? ids_restore, Tensor? cu_seqlens, SymInt num_kept, "
    "SymInt patch_size) -> Tensor",
    fake=_bwd_fake,
    launcher="masked_loss:launch_bwd",
)


class _MaskedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        raw: Tensor,
        images: Tensor,
        noised: Tensor,
        c_skip: Tensor,
        c_out: Tensor,
        weight: Tensor,
        ids_restore: Tensor | None,
        cu_seqlens: Tensor | None,
        num_kept: int,
        patch_size: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(raw, images, noised, c_skip, c_out, weight, ids_restore, cu_seqlens)
        ctx.constants = (num_kept, patch_size)
        denoising, reconstruction = masked_loss_fwd(
            raw, images, noised, c_skip, c_out, weight, ids_restore, cu_seqlens, num_kept, patch_size
        )
        return denoising, reconstruction

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_denoising: Tensor, grad_reconstruction: Tensor) -> tuple[Tensor | None, ...]:
        grad_raw = masked_loss_bwd(
            grad_denoising.contiguous(), grad_reconstruction.contiguous(), *ctx.saved_tensors, *ctx.constants
        )
        return grad_raw, *(None,) * 9


@public_op("masked_loss_fwd", "masked_loss_bwd")
def masked_loss(
    raw: Tensor,
    images: Tensor,
    noised: Tensor,
    c_skip: Tensor,
    c_out: Tensor,
    weight: Tensor,
    mask: Mask | None,
    *,
    patch_size: int,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the denoising and the reconstruction loss of each sample from the network's raw tokens.

    Computes in fp32. The fused form is differentiable in raw only, with a gradient in its dtype; the reference in raw,
    images, noised and the coefficients. Deterministic.

    Args:
        raw: the network's output F for every position, shape (B, L, P), laid out (p, p, C) with channels fastest. Raw
            and the images are copied first if not contiguous.
        images: clean images, shape (B, C, h * p, w * p).
        noised: images plus noise, the same shape.
        c_skip: factor of the noised image in the denoised one, shape (B,).
        c_out: factor of the network's output in the denoised image, shape (B,).
        weight: weight of each sample's denoising loss, shape (B,).
        mask: positions that the encoder saw, dense or packed; None is all. The values of its ``cu_seqlens`` are checked
            on a CPU, outside torch.compile.
        patch_size: p.
        impl: "fused" (fp32, bf16 or fp16 tensors and fp32 coefficients, P up to 1024), "reference" (any floating dtype
            and patch size; float64 for float64 raw), or None for the default of the device, which on a CPU is the
            reference if other gradients than raw's are required.

    Returns:
        Two tensors of shape (B,), fp32. The denoising loss is 0 for a sample without kept patches, the reconstruction
        loss for one without dropped patches.

    Raises:
        ValueError: shapes that do not fit, a mask for patches of one value, or inputs that the fused kernels do not
            support.
        BackendUnavailableError: no fused kernel on this device.
    """
    coefficients = {"c_skip": c_skip, "c_out": c_out, "weight": weight}
    _check_images(raw, images, noised, coefficients, patch_size)
    if mask is not None:
        _check_mask(mask, raw)
    if resolve_impl(impl, "masked_loss_fwd", raw.device, raw, images, noised, *coefficients.values()) == "reference":
        return masked_loss_reference(raw, images, noised, c_skip, c_out, weight, mask, patch_size=patch_size)
    _check_fused(raw, images, noised, coefficients)
    ids_restore, cu_seqlens, num_kept = None, None, raw.shape[1]
    if mask is not None:
        ids_restore = mask.ids_restore.contiguous()
        if mask.cu_seqlens is None:
            num_kept = mask.ids_keep.shape[1]
        else:
            cu_seqlens = mask.cu_seqlens.contiguous()
    denoising, reconstruction = _MaskedLoss.apply(  # type: ignore[no-untyped-call]
        *(tensor.contiguous() for tensor in (raw, images, noised, *coefficients.values())),
        ids_restore,
        cu_seqlens,
        num_kept,
        patch_size,
    )
    return denoising, reconstruction


def _check_images(
    raw: Tensor, images: Tensor, noised: Tensor, coefficients: Mapping[str, Tensor], patch_size: int
) -> None:
    check_tensors(raw=raw, images=images)
    if images.ndim != 4:
        raise ValueError(f"images must have shape (B, C, h * p, w * p), not {tuple(images.shape)}")
    check_devices(raw.device, images=images, noised=noised, **coefficients)
    batch, channels, height, width = images.shape
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"images of {height}x{width} do not divide into patches of {patch_size}x{patch_size}")
    if noised.shape != images.shape:
        raise ValueError(f"noised must have the shape of images, {tuple(images.shape)}, not {tuple(noised.shape)}")
    for name, tensor in coefficients.items():
        if tensor.shape != (batch,):
            raise ValueError(f"{name} must have shape ({batch},), not {tuple(tensor.shape)}")
    expected = (batch, (height // patch_size) * (width // patch_size), patch_size * patch_size * channels)
    if raw.shape != expected:
        raise ValueError(f"raw must have shape {expected} for these images, not {tuple(raw.shape)}")


def _check_mask(mask: Mask, raw: Tensor) -> None:
    batch, length, values = raw.shape
    if values == 1:
        raise ValueError(
            "a mask needs patches of at least two values, to which the reconstruction loss norms them, and raw has "
            f"shape {(batch, length, values)}: a patch of one value has no variance"
        )
    if mask.ids_restore.shape != (batch, length):
        raise ValueError(f"mask.ids_restore must have shape {(batch, length)}, not {tuple(mask.ids_restore.shape)}")
    if mask.ids_restore.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"mask.ids_restore must be int32 or int64, not {mask.ids_restore.dtype}")
    check_devices(raw.device, ids_restore=mask.ids_restore, cu_seqlens=mask.cu_seqlens)
    if mask.cu_seqlens is None:
        if mask.ids_keep.ndim != 2 or mask.ids_keep.shape[0] != batch:
            raise ValueError(f"mask.ids_keep must have shape ({batch}, K), not {tuple(mask.ids_keep.shape)}")
        if mask.ids_keep.shape[1] > length:
            given = tuple(mask.ids_keep.shape)
            raise ValueError(f"mask.ids_keep of shape {given} keeps more than the {length} positions of a sample")
        return
    check_cu_seqlens(mask.cu_seqlens)
    if mask.cu_seqlens.shape[0] != batch + 1:
        raise ValueError(f"mask.cu_seqlens must have shape ({batch + 1},), not {tuple(mask.cu_seqlens.shape)}")
    if mask.ids_keep.ndim != 1:
        raise ValueError(f"mask.ids_keep must have shape (N,) with cu_seqlens, not {tuple(mask.ids_keep.shape)}")
    check_bounds(mask.cu_seqlens, mask.ids_keep.shape[0], "entries of mask.ids_keep", length)


def _check_fused(raw: Tensor, images: Tensor, noised: Tensor, coefficients: Mapping[str, Tensor]) -> None:
    for name, tensor in (("raw", raw), ("images", images), ("noised", noised)):
        check_dtype(name, tensor)
    for name, tensor in coefficients.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f'the fused kernels take a float32 {name}, not {tensor.dtype}: impl="reference" takes any')
    if raw.shape[2] > MAX_VALUES:
        raise ValueError(
            f"the fused kernels take patches of up to {MAX_VALUES} values, and raw has shape {tuple(raw.shape)}: "
            f'impl="reference" takes any'
        )
    for name, tensor in (("images", images), ("noised", noised), *coefficients.items()):
        if needs_gradient(tensor):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} requires grad, and the fused form is differentiable in raw "
                f'alone: detach it, or pass impl="reference"'
            )
