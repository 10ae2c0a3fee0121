"""MaskDiT's two losses in token space (arXiv 2306.09305, equations 3 to 5; EDM preconditioning, arXiv 2206.00364).

With d = c_skip * noised + c_out * raw, the denoised patch:

    denoising      = mean over kept patches of    weight * mean over the patch of (d - image)^2
    reconstruction = mean over dropped patches of mean over the patch of (d - normed)^2
    normed         = (noised - mean) / sqrt(var + 1e-6), per patch, var unbiased
"""

import torch
from torch import Tensor

from fastmask.kernels.patches import patchify
from fastmask.kernels.sample_mask import Mask

_EPS = 1e-6


def masked_loss(
    raw: Tensor,
    images: Tensor,
    noised: Tensor,
    sigma: Tensor,
    mask: Mask | None,
    *,
    patch_size: int,
    sigma_data: float,
) -> tuple[Tensor, Tensor]:
    """Return the denoising and the reconstruction loss of each sample from the network's raw tokens.

    Computes in fp32 (float64 for float64 input).

    Args:
        raw: the network's output F for every position, shape (B, L, P).
        images: clean images, shape (B, C, h * p, w * p).
        noised: images plus noise, the same shape.
        sigma: noise level of each sample, shape (B,).
        mask: which positions the encoder saw; None is all of them.
        patch_size: p.
        sigma_data: standard deviation of the data.

    Returns:
        Two tensors of shape (B,). The reconstruction loss is 0 where nothing was dropped.
    """
    compute = torch.promote_types(raw.dtype, torch.float32)
    images = patchify(images, patch_size).to(compute)  # (B, L, P)
    noised = patchify(noised, patch_size).to(compute)
    if raw.shape != images.shape:
        raise ValueError(f"raw must have shape {tuple(images.shape)} for these images, not {tuple(raw.shape)}")
    variance = sigma.to(compute)[:, None, None].square()
    total = variance + sigma_data**2
    weight = total / (variance * sigma_data**2)
    denoised = sigma_data**2 / total * noised + (variance / total).sqrt() * sigma_data * raw.to(compute)

    squared = (weight * (denoised - images).square()).mean(-1)  # (B, L)
    if mask is None or mask.ids_keep.shape[1] == mask.ids_restore.shape[1]:
        return squared.mean(1), torch.zeros_like(squared[:, 0])

    dropped = mask.dropped
    num_kept = mask.ids_keep.shape[1]
    var, mean = torch.var_mean(noised, dim=-1, keepdim=True)
    normed = (noised - mean) / (var + _EPS).sqrt()
    reconstruction = (denoised - normed).square().mean(-1)
    return (
        squared.masked_fill(dropped, 0).sum(1) / num_kept,
        reconstruction.masked_fill(~dropped, 0).sum(1) / (dropped.shape[1] - num_kept),
    )
