"""Gated residual addition and adaLN norm of an adaLN-Zero block (arXiv 2212.09748, section 3.2).

    x' = x + gate * branch;  h = norm(x') * (1 + scale) + shift

norm as in `modulate_norm`. Backward, with n the gradient of x' through the norm (see there):

    grad_x = grad_x' + n;  grad_branch = gate * grad_x;  grad_gate = sum of branch * grad_x

Backward keeps x', branch and two statistics per token, but not x and h, and of these only what the gradients read that
are asked for. All computation is in fp32. Memory traffic per value: x, branch, x' and h forward; grad_x', grad_h, x',
branch, grad_x and grad_branch backward.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmask.kernels._asked import only_asked, readable, unread
from fastmask.kernels._dispatch import Impl, define_op, public_op, resolve_impl
from fastmask.kernels._layout import (
    Rows,
    as_rows,
    check_devices,
    check_dtype,
    check_tokens,
    modulation_of,
    native_rows,
    per_token,
)
from fastmask.kernels.modulate_norm import (
    Norm,
    check_affine,
    check_norm,
    folded,
    modulate_norm_reference,
    norm_gradients,
    norm_kept,
    resolve_out_dtype,
)


def add_gated_norm_reference(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    norm: Norm = "layer",
    eps: float = 1e-6,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Reference for `add_gated_norm` in plain PyTorch; modulations (B, D) or per token, any float dtype and width."""
    gate = per_token("gate", gate, x, cu_seqlens)
    compute = torch.promote_types(x.dtype, torch.float32)
    x = (x.to(compute) + gate.to(compute) * branch.to(compute)).to(x.dtype)
    return x, modulate_norm_reference(
        x, shift, scale, norm=norm, eps=eps, norm_weight=norm_weight, norm_bias=norm_bias, cu_seqlens=cu_seqlens,
        out_dtype=out_dtype,
    )  # fmt: skip


def _fwd_fake(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor | None,
    rms: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    stats = x.new_empty((2, x.shape[0]), dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(x, dtype=out_dtype), stats


def _bwd_fake(
    grad_new: Tensor | None,
    grad_h: Tensor,
    x_new: Tensor,
    stats: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor | None,
    rms: bool,
    recompute: bool,
) -> tuple[Tensor, ...]:
    sums = [t.new_empty(t.shape) for t in (gate, shift, scale)]
    h = torch.empty_like(grad_h) if recompute else grad_h.new_empty(0)
    return torch.empty_like(x_new), torch.empty_like(branch), *sums, h


add_gated_norm_fwd = define_op(
    "add_gated_norm_fwd(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, Tensor? cu_seqlens, "
    "bool rms, float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    fake=_fwd_fake,
    launcher="add_gated_norm:launch_fwd",
    native=native_rows,
)
add_gated_norm_bwd = define_op(
    "add_gated_norm_bwd(Tensor? grad_new, Tensor grad_h, Tensor x_new, Tensor stats, Tensor branch, Tensor gate, "
    "Tensor shift, Tensor scale, Tensor? cu_seqlens, bool rms, bool recompute) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_bwd_fake,
    launcher="add_gated_norm:launch_bwd",
)


def gated_kept(
    x_new: Tensor,
    stats: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor | None,
    asked: Sequence[bool],
    recompute: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return what `gated_gradients` takes; see `norm_kept`.

    Args:
        x_new: x', shape (N, D).
        stats: shape (2, N).
        branch: shape (N, D).
        gate: shape (G, D).
        shift: shape (G, D).
        scale: shape (G, D).
        cu_seqlens: shape (G + 1,), or None.
        asked: whether the gradients of x, branch, gate, shift and scale are computed.
        recompute: whether h is recomputed.
    """
    of_x, of_branch, of_gate, *of_norm = asked
    kept = norm_kept(x_new, stats, shift, scale, cu_seqlens, (of_x or of_branch or of_gate, *of_norm), recompute)
    return *kept, branch if of_gate else unread(branch), gate if of_branch else unread(gate)


def gated_gradients(
    grad_new: Tensor | None,
    grad_h: Tensor,
    kept: Sequence[Tensor | None],
    rms: bool,
    asked: Sequence[bool],
    recompute: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return the gradients that are asked for, None for others, and h (empty without ``recompute``).

    ``kept`` is from `gated_kept`.
    """
    if not any(asked[:3]):  # x' is none of theirs, so its gradient is not
        *grads, h = norm_gradients(grad_h, kept[:5], rms, recompute)
        return None, None, None, *only_asked(asked[3:], grads[1:]), h
    x_new, shift, scale, gate = (readable(kept[i], grad_h.shape[1]) for i in (0, 2, 3, 6))
    # A branch that is not read is as large as x', which is there to be read in its place.
    branch = kept[5]
    if branch is not None and not branch.shape[1] and branch.dtype == x_new.dtype:
        branch = x_new
    branch = readable(branch, grad_h.shape[1])
    grad_new = None if grad_new is None else grad_new.contiguous()
    *grads, h = add_gated_norm_bwd(
        grad_new, grad_h.contiguous(), x_new, kept[1], branch, gate, shift, scale, kept[4], rms, recompute
    )
    return *only_asked(asked, grads), h


class _AddGatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor,
        gate: Tensor,
        shift: Tensor,
        scale: Tensor,
        cu_seqlens: Tensor | None,
        rms: bool,
        eps: float,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        x_new, h, stats = add_gated_norm_fwd(x, branch, gate, shift, scale, cu_seqlens, rms, eps, out_dtype)
        asked = ctx.needs_input_grad[:5]
        ctx.save_for_backward(*gated_kept(x_new, stats, branch, gate, shift, scale, cu_seqlens, asked))
        ctx.rms = rms
        ctx.set_materialize_grads(False)
        if not any(asked[:3]):
            ctx.mark_non_differentiable(x_new)
        return x_new, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_new: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_h is None:
            if grad_new is None:
                return (None,) * 9
            grad_h = torch.zeros_like(grad_new)
        grads = gated_gradients(grad_new, grad_h, ctx.saved_tensors, ctx.rms, ctx.needs_input_grad[:5])
        return *grads[:5], None, None, None, None


@public_op("add_gated_norm_fwd", "add_gated_norm_bwd")
def add_gated_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
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
) -> tuple[Tensor, Tensor]:
    """Return ``x + gate * branch`` and its modulated norm.

    Equivalent PyTorch, for modulations per sample: ``x = x + gate[:, None] * branch``, then `modulate_norm`. Computes
    in fp32; the new residual is rounded to the dtype of ``x`` before the norm, h once after it. Differentiable in x,
    branch, gate, shift and scale; each gradient has its input's dtype. Deterministic.

    Args:
        x: residual stream, shape (B, K, D), or (N, D) with ``cu_seqlens``; copied first if not contiguous.
        branch: output of attention or the MLP, same shape as ``x``; copied likewise.
        gate: per sample, (B, D) or (B, 1, D); per token, same shape as ``x``; of all samples, (D,), (1, D) or
            (1, 1, D); None is 1.
        shift: like ``gate``; None is 0.
        scale: like ``shift``.
        norm: "layer" or "rms".
        eps: added to the variance (to the mean square for "rms"), at least 0.
        norm_weight: weight of an affine norm, shape (D,), as in `modulate_norm`.
        norm_bias: its bias, shape (D,).
        cu_seqlens: int32 or int64, shape (B + 1,), non-decreasing from 0 to N: boundaries of packed samples. Values
            are checked on a CPU, outside torch.compile.
        out_dtype: floating dtype of h; None is the dtype of ``x``. float64 is the reference's.
        impl: "fused" (float32, bfloat16, float16; D a multiple of 8 up to 8192), "reference", or None for the device's
            default.

    Returns:
        The new residual, in the dtype of ``x``, and its modulated norm, both with the shape of ``x``.

    Raises:
        ValueError: shapes that do not fit, or inputs that the fused kernels do not support.
        BackendUnavailableError: no fused kernel on this device.
    """
    check_branch(x, branch, norm, eps, cu_seqlens)
    gate, shift, scale = gated_modulations(x, gate, shift, scale, cu_seqlens)
    check_affine(x, norm_weight, norm_bias)
    out_dtype, impl = resolve_out_dtype(out_dtype, x, impl)
    tensors = x, branch, gate, shift, scale, norm_weight, norm_bias
    if resolve_impl(impl, "add_gated_norm_fwd", x.device, *tensors) == "reference":
        return add_gated_norm_reference(
            x, branch, gate, shift, scale, norm=norm, eps=eps, norm_weight=norm_weight, norm_bias=norm_bias,
            cu_seqlens=cu_seqlens, out_dtype=out_dtype,
        )  # fmt: skip
    shift, scale = folded(x, shift, scale, norm_weight, norm_bias, cu_seqlens)
    rows = branch_rows(x, branch, gate, shift, scale, cu_seqlens)
    check_dtype("out_dtype", out_dtype)
    x_new, h = _AddGatedNorm.apply(  # type: ignore[no-untyped-call]
        *rows, norm == "rms", float(eps), out_dtype
    )
    return x_new.view(x.shape), h.view(x.shape)


def gated_modulations(
    x: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gate, shift and scale as `modulation_of` does; a ValueError for those that do not fit x."""
    check_devices(x.device, gate=gate, shift=shift, scale=scale)
    return (
        modulation_of("gate", gate, x, cu_seqlens, 1),
        modulation_of("shift", shift, x, cu_seqlens, 0),
        modulation_of("scale", scale, x, cu_seqlens, 0),
    )


def check_branch(x: Tensor, branch: Tensor, norm: str, eps: float, cu_seqlens: Tensor | None) -> None:
    """Raise a ValueError for an unknown norm, a wrong eps, or shapes or devices of tokens that do not fit."""
    check_norm(norm, eps)
    check_tokens("x", x, cu_seqlens)
    check_devices(x.device, branch=branch, cu_seqlens=cu_seqlens)
    if branch.shape != x.shape:
        raise ValueError(f"branch must have the shape of x, {tuple(x.shape)}, not {tuple(branch.shape)}")


def branch_rows(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return x, branch, gate, shift, scale and cu_seqlens as arguments of the ops; see `as_rows`."""
    rows: Rows = as_rows(x, cu_seqlens, {"gate": gate, "shift": shift, "scale": scale})
    check_dtype("branch", branch)
    return rows.x, branch.reshape(rows.x.shape).contiguous(), *rows.modulations, rows.cu_seqlens
