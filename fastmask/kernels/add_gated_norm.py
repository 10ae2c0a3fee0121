"""The end of one branch of an adaLN-Zero block and the start of the next (arXiv 2212.09748, section 3.2).

x' = x + gate * branch;  h = LN(x') * (1 + scale) + shift.
"""

import torch
from torch import Tensor

from fastmask.kernels.modulate_norm import modulate_norm, per_token


def add_gated_norm(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Return ``x + gate * branch`` and the modulated norm of it.

    Computes in fp32 (float64 for float64 input).

    Args:
        x: residual stream, shape (B, K, D).
        branch: output of attention or of the MLP, shape (B, K, D).
        gate: per sample (B, D) or per token (B, K, D).
        shift: like ``gate``.
        scale: like ``gate``.
        eps: added to the variance.

    Returns:
        The new residual and its modulated norm, both of shape (B, K, D) and the dtype of ``x``.

    Raises:
        ValueError: a shape that does not fit ``x``.
    """
    if branch.shape != x.shape:
        raise ValueError(f"branch must have the shape of x, {tuple(x.shape)}, not {tuple(branch.shape)}")
    gate = per_token(x, "gate", gate)
    compute = torch.promote_types(x.dtype, torch.float32)
    x = (x.to(compute) + gate.to(compute) * branch.to(compute)).to(x.dtype)
    return x, modulate_norm(x, shift, scale, eps=eps)
