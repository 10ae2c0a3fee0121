"""The adaptive layer norm of a diffusion transformer (adaLN, arXiv 2212.09748, section 3.2).

h = LN(x) * (1 + scale) + shift, LN over the last dimension without an affine part.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def modulate_norm(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Return ``layer_norm(x) * (1 + scale) + shift``.

    Computes in fp32 (float64 for float64 input) and returns the dtype of ``x``.

    Args:
        x: tokens, shape (B, K, D).
        shift: per sample (B, D) or per token (B, K, D).
        scale: like ``shift``.
        eps: added to the variance.

    Returns:
        Shape (B, K, D), dtype of ``x``.

    Raises:
        ValueError: a modulation whose shape fits neither form.
    """
    shift, scale = per_token(x, "shift", shift), per_token(x, "scale", scale)
    compute = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(compute), x.shape[-1:], eps=eps)
    return (normed * (1 + scale.to(compute)) + shift.to(compute)).to(x.dtype)


def per_token(x: Tensor, name: str, modulation: Tensor) -> Tensor:
    """Return a (B, D) or (B, K, D) modulation in a form that broadcasts against ``x`` (B, K, D)."""
    if x.ndim != 3:
        raise ValueError(f"x must have shape (B, K, D), not {tuple(x.shape)}")
    if modulation.shape == (x.shape[0], x.shape[2]):
        return modulation[:, None]
    if modulation.shape == x.shape:
        return modulation
    expected = f"{(x.shape[0], x.shape[2])} or {tuple(x.shape)}"
    raise ValueError(
        f"{name} must have shape {expected} for x of shape {tuple(x.shape)}, not {tuple(modulation.shape)}"
    )
