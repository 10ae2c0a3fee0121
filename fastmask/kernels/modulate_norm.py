"""Adaptive norm (adaLN) of diffusion transformers (arXiv 2212.09748, section 3.2).

    h = norm(x) * (1 + scale) + shift

norm is LayerNorm, (x - mean) / sqrt(var + eps), or RMSNorm, x / sqrt(mean(x^2) + eps), over the last dimension,
without affine parameters. With xhat = norm(x) and g = grad_h * (1 + scale), backward is

    grad_x     = (g - mean(g) - xhat * mean(g * xhat)) / sqrt(var + eps)      without mean(g) for RMSNorm
    grad_shift = sum of grad_h,  grad_scale = sum of grad_h * xhat            over the tokens that share them

Backward keeps x and two statistics per token, but not h, and of these only what the gradients read that are asked for.
All computation is in fp32. Memory traffic per value: x and h forward; x, grad_h and grad_x backward.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmask.kernels._asked import only_asked, readable, unread
from fastmask.kernels._dispatch import Impl, define_op, public_op, resolve_impl
from fastmask.kernels._layout import (
    as_rows,
    check_devices,
    check_dtype,
    check_tokens,
    is_per_sample,
    is_supported,
    modulation_of,
    native_rows,
    per_token,
)

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
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Reference for `modulate_norm` in plain PyTorch; modulations (B, D) or per token, any float dtype and width."""
    shift, scale = per_token("shift", shift, x, cu_seqlens), per_token("scale", scale, x, cu_seqlens)
    normed = normalise(x, norm, eps)
    if norm_weight is not None:
        normed = normed * norm_weight.to(normed.dtype)
    if norm_bias is not None:
        normed = normed + norm_bias.to(normed.dtype)
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
    recompute: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return what `norm_gradients` takes, with the values of no tensor that the gradients asked for do not read.

    Args:
        x: the normalised tokens, shape (N, D).
        stats: shape (2, N).
        shift: shape (G, D).
        scale: shape (G, D).
        cu_seqlens: shape (G + 1,), or None.
        asked: whether the gradients of x, shift and scale are computed.
        recompute: whether h is recomputed.
    """
    of_x, of_shift, of_scale = asked
    by_token = of_x or of_scale
    return (
        x if by_token or recompute else unread(x),
        stats if by_token or (recompute and of_shift) else None,
        shift if recompute else unread(shift),
        scale if of_x or recompute else unread(scale),
        cu_seqlens if any(asked) or recompute else None,
    )


def norm_gradients(
    grad_h: Tensor, kept: Sequence[Tensor | None], rms: bool, recompute: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the results of `modulate_norm_bwd` from `norm_kept`; a gradient that was not asked for is none."""
    x, shift, scale = (readable(kept[i], grad_h.shape[1]) for i in (0, 2, 3))
    stats = x.new_zeros((2, x.shape[0]), dtype=torch.float32) if kept[1] is None else kept[1]
    grads: tuple[Tensor, Tensor, Tensor, Tensor] = modulate_norm_bwd(
        grad_h.contiguous(), x, stats, shift, scale, kept[4], rms, recompute
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
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    norm: Norm = "layer",
    eps: float = 1e-6,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
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
        shift: per sample, (B, D) or (B, 1, D); per token, same shape as ``x``; of all samples, (D,), (1, D) or
            (1, 1, D); None is 0.
        scale: like ``shift``.
        norm: "layer" or "rms".
        eps: added to the variance (to the mean square for "rms"), at least 0.
        norm_weight: weight of an affine norm, shape (D,), with ``norm(x) * norm_weight + norm_bias`` in place of
            ``norm(x)``. The fused form folds both into scale and shift, in fp32, before its kernel.
        norm_bias: bias of an affine norm, shape (D,).
        cu_seqlens: int32 or int64, shape (B + 1,), non-decreasing from 0 to N: boundaries of packed samples. Values
            are checked on a CPU, outside torch.compile.
        out_dtype: floating dtype of the result; None is the dtype of ``x``. float64 is the reference's.
        impl: "fused" (float32, bfloat16, float16; D a multiple of 8 up to 8192), "reference", or None for the device's
            default.

    Returns:
        Shape of ``x``.

    Raises:
        ValueError: shapes that do not fit, or inputs that the fused kernels do not support.
        BackendUnavailableError: no fused kernel on this device.
    """
    check_norm(norm, eps)
    check_tokens("x", x, cu_seqlens)
    check_devices(x.device, shift=shift, scale=scale, cu_seqlens=cu_seqlens)
    check_affine(x, norm_weight, norm_bias)
    shift, scale = (modulation_of(name, t, x, cu_seqlens, 0) for name, t in (("shift", shift), ("scale", scale)))
    out_dtype, impl = resolve_out_dtype(out_dtype, x, impl)
    if resolve_impl(impl, "modulate_norm_fwd", x.device, x, shift, scale, norm_weight, norm_bias) == "reference":
        return modulate_norm_reference(
            x, shift, scale, norm=norm, eps=eps, norm_weight=norm_weight, norm_bias=norm_bias, cu_seqlens=cu_seqlens,
            out_dtype=out_dtype,
        )  # fmt: skip
    shift, scale = folded(x, shift, scale, norm_weight, norm_bias, cu_seqlens)
    rows = as_rows(x, cu_seqlens, {"shift": shift, "scale": scale})
    check_dtype("out_dtype", out_dtype)
    h: Tensor = _ModulateNorm.apply(  # type: ignore[no-untyped-call]
        rows.x, *rows.modulations, rows.cu_seqlens, norm == "rms", float(eps), out_dtype
    )
    return h.view(x.shape)


def check_norm(norm: str, eps: float) -> None:
    """Raise a ValueError unless ``norm`` is "layer" or "rms" and ``eps`` is a finite number of at least 0."""
    if norm not in ("layer", "rms"):
        raise ValueError(f'norm must be "layer" or "rms", not {norm!r}')
    if eps is None or not 0 <= eps < math.inf:
        raise ValueError(
            f"eps must be a finite number of at least 0, not {eps}"
            + (": the None of torch.nn.RMSNorm is torch.finfo(x.dtype).eps" if eps is None else "")
        )


def check_affine(x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None) -> None:
    """Raise a ValueError unless the weight and bias of an affine norm have shape (D,), on the device of ``x``."""
    check_devices(x.device, norm_weight=norm_weight, norm_bias=norm_bias)
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is not None and tensor.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape ({x.shape[-1]},), not {tuple(tensor.shape)}")


def resolve_out_dtype(out_dtype: torch.dtype | None, x: Tensor, impl: Impl | None) -> tuple[torch.dtype, Impl | None]:
    """Return the dtype of h, and "reference" in place of an ``impl`` None where no kernel writes that dtype."""
    if out_dtype is None:
        return x.dtype, impl
    if not out_dtype.is_floating_point:
        raise ValueError(f"out_dtype must be a floating dtype, not {out_dtype}")
    return out_dtype, "reference" if impl is None and not is_supported(out_dtype) else impl


def folded(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the shift and scale of the plain norm that give what these give to an affine one; autograd goes through.

    (n w + b) (1 + scale) + shift = n (1 + scale') + shift' with shift' = (1 + scale) b + shift and
    scale' = (1 + scale) w - 1, both in fp32: a w far below 1 is rounded as 1 is, to 2^-24.
    """
    if norm_weight is None and norm_bias is None:
        return shift, scale
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is not None:
            check_dtype(name, tensor)
    if is_per_sample("shift", shift, x, cu_seqlens) != is_per_sample("scale", scale, x, cu_seqlens):
        shift = per_token("shift", shift, x, cu_seqlens).expand(x.shape)
        scale = per_token("scale", scale, x, cu_seqlens).expand(x.shape)
    factor = 1 + scale.float()
    if norm_bias is not None:
        shift = factor * norm_bias.float() + shift.float()
    return shift, scale if norm_weight is None else factor * norm_weight.float() - 1
