"""Adaptive norm (adaLN) of diffusion transformers (arXiv 2212.09748, section 3.2).

    h = norm(x) * (1 + scale) + shift

norm is LayerNorm, (x - mean) / sqrt(var + eps), or RMSNorm, x / sqrt(mean(x^2) + eps), over the last dimension,
without affine parameters. With xhat = norm(x) and g = grad_h * (1 + scale), backward is

    grad_x     = (g - mean(g) - xhat * mean(g * xhat)) / sqrt(var + eps)      without mean(g) for RMSNorm
    grad_shift = sum of grad_h,  grad_scale = sum of grad_h * xhat            over the tokens that share them

Backward keeps x and two statistics per token, but not h, and of these only what the gradients read that are asked for.
All computation is in fp32. Memory traffic per value: x and h forward; x, grad_h and grad_x backward.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmask.kernels._asked import only_asked, readable, unread
from fastmask.kernels._dispatch import Impl, define_op, public_op, resolve_impl
from fastmask.kernels._layout import as_rows, check_devices, check_dtype, check_tokens, native_rows, per_token

Norm = Literal["layer", "rms"]


def normalise(x: Tensor, norm: Norm, eps: float) -> Tensor:
    """Normalise the last dimension; computed and returned in fp32 (float64 for float64 input)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm == "rms":
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def modulate_norm_reference(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    norm: Norm = "layer",
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Reference for `modulate_norm` in plain PyTorch; same arguments, any floating dtype and width."""
    shift, scale = per_token("shift", shift, x, cu_seqlens), per_token("scale", scale, x, cu_seqlens)
    normed = normalise(x, norm, eps)
    return (normed * (1 + scale.to(normed.dtype)) + shift.to(normed.dtype)).to(out_dtype or x.dtype)


def _fwd_fake(
    x: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor | None, rms: bool, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=out_dtype), x.new_empty((2, x.shape[0]), dtype=torch.float32)


def _bwd_fake(
    grad_h: Tensor,
    x: Tensor,
    stats: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor | None,
    rms: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = torch.empty_like(grad_h) if recompute else grad_h.new_empty(0)
    return torch.empty_like(x), shift.new_empty(shift.shape), scale.new_empty(scale.shape), h


modulate_norm_fwd = define_op(
    "modulate_norm_fwd(Tensor x, Tensor shift, Tensor scale, Tensor? cu_seqlens, bool rms, float eps, "
    "ScalarType out_dtype) -> (Tensor, Tensor)",
    fake=_fwd_fake,
    launcher="modulate_norm:launch_fwd",
    native=native_rows,
)
modulate_norm_bwd = define_op(
    "modulate_norm_bwd(Tensor grad_h, Tensor x, Tensor stats, Tensor shift, Tensor scale, Tensor? cu_seqlens, "
    "bool rms, bool recompute) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_bwd_fake,
    launcher="modulate_norm:launch_bwd",
)


def norm_kept(
    x: Tensor,
    stats: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor | None,
    asked: Sequence[bool],
    again: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return what `norm_gradients` takes, with the values of no tensor that the gradients asked for do not read.

    Args:
        x: the normalised tokens, shape (N, D).
        stats: shape (2, N).
        shift: shape (G, D).
        scale: shape (G, D).
        cu_seqlens: shape (G + 1,), or None.
        asked: whether the gradients of x, shift and scale are computed.
        again: whether h is computed again.
    """
    of_x, of_shift, of_scale = asked
    by_token = of_x or of_scale
    return (
        x if by_token or again else unread(x),
        stats if by_token or (again and of_shift) else None,
        shift if again else unread(shift),
        scale if of_x or again else unread(scale),
        cu_seqlens if any(asked) or again else None,
    )


def norm_gradients(
    grad_h: Tensor, kept: Sequence[Tensor | None], rms: bool, again: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the results of `modulate_norm_bwd` from `norm_kept`; a gradient that was not asked for is none."""
    x, shift, scale = (readable(kept[i], grad_h.shape[1]) for i in (0, 2, 3))
    stats = x.new_zeros((2, x.shape[0]), dtype=torch.float32) if kept[1] is None else kept[1]
    grads: tuple[Tensor, Tensor, Tensor, Tensor] = modulate_norm_bwd(
        grad_h.contiguous(), x, stats, shift, scale, kept[4], rms, again
    )
    return grads


class _ModulateNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        cu_seqlens: Tensor | None,
        rms: bool,
        eps: float,
        out_dtype: torch.dtype,
    ) -> Tensor:
        h: Tensor
        h, stats = modulate_norm_fwd(x, shift, scale, cu_seqlens, rms, eps, out_dtype)
        ctx.save_for_backward(*norm_kept(x, stats, shift, scale, cu_seqlens, ctx.needs_input_grad[:3]))
        ctx.rms = rms
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, ...]:
        grads = norm_gradients(grad_h, ctx.saved_tensors, ctx.rms)
        return *only_asked(ctx.needs_input_grad[:3], grads[:3]), None, None, None, None


@public_op("modulate_norm_fwd", "modulate_norm_bwd")
def modulate_norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    norm: Norm = "layer",
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Return ``norm(x) * (1 + scale) + shift``.

    Equivalent PyTorch, for modulations per sample: ``F.layer_norm(x, (D,)) * (1 + scale[:, None]) + shift[:, None]``.
    Computes in fp32 and returns the dtype of ``x`` (or ``out_dtype``), rounded once. Differentiable in x, shift and
    scale; each gradient has its input's dtype. Deterministic.

    Args:
        x: tokens, shape (B, K, D), or (N, D) with ``cu_seqlens``; copied first if not contiguous.
        shift: per sample (B, D), or per token, same shape as ``x``.
        scale: like ``shift``.
        norm: "layer" or "rms".
        eps: added to the variance (to the mean square for "rms").
        cu_seqlens: int32 or int64, shape (B + 1,), non-decreasing from 0 to N: boundaries of packed samples. Values
            are checked on a CPU, outside torch.compile.
        out_dtype: dtype of the result; None is the dtype of ``x``.
        impl: "fused" (float32, bfloat16, float16; D a multiple of 8 up to 8192), "reference", or None for the device's
            default.

    Returns:
        Shape of ``x``.

    Raises:
        ValueError: shapes that do not fit, or inputs that the fused kernels do not support.
        BackendUnavailableError: no fused kernel on this device.
    """
    check_norm(norm)
    check_tokens("x", x, cu_seqlens)
    check_devices(x.device, shift=shift, scale=scale, cu_seqlens=cu_seqlens)
    out_dtype = out_dtype or x.dtype
    if resolve_impl(impl, "modulate_norm_fwd", x.device, x, shift, scale) == "reference":
        return modulate_norm_reference(x, shift, scale, norm=norm, eps=eps, cu_seqlens=cu_seqlens, out_dtype=out_dtype)
    rows = as_rows(x, cu_seqlens, {"shift": shift, "scale": scale})
    check_dtype("out_dtype", out_dtype)
    h: Tensor = _ModulateNorm.apply(  # type: ignore[no-untyped-call]
        rows.x, *rows.modulations, rows.cu_seqlens, norm == "rms", float(eps), out_dtype
    )
    return h.view(x.shape)


def check_norm(norm: str) -> None:
    """Raise a ValueError unless ``norm`` is "layer" or "rms"."""
    if norm not in ("layer", "rms"):
        raise ValueError(f'norm must be "layer" or "rms", not {norm!r}')
