"""Modulated norm followed by a Linear, the start of both branches of an adaLN block (qkv and fc1).

    modulated_linear:   y = h W^T + b,  h = modulate_norm(x, shift, scale)
    add_gated_linear:   the same after add_gated_norm, x' = x + gate * branch

Plain PyTorch keeps h for the gradient of the weight. Here backward recomputes it, in the dtype of the matmul, in the
pass that reads x and the statistics for the gradient of the norm. A frozen weight costs no gradient and keeps nothing
for it, and where only weight and bias are trained h is recomputed by the forward kernel.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastmask.kernels._asked import only_asked
from fastmask.kernels._dispatch import Impl, public_op, resolve_impl
from fastmask.kernels._layout import (
    as_rows,
    check_devices,
    check_dtype,
    check_tokens,
    modulation_of,
)
from fastmask.kernels._matmul import (
    check_linear,
    check_plain,
    input_dtype,
    linear_gradients,
    product_dtype,
    product_operands,
    weights_of,
)
from fastmask.kernels.add_gated_norm import (
    add_gated_norm,
    add_gated_norm_fwd,
    add_gated_norm_reference,
    branch_rows,
    check_branch,
    gated_gradients,
    gated_kept,
    gated_modulations,
)
from fastmask.kernels.modulate_norm import (
    Norm,
    check_affine,
    check_norm,
    folded,
    modulate_norm,
    modulate_norm_fwd,
    modulate_norm_reference,
    norm_gradients,
    norm_kept,
)


class _ModulatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        cu_seqlens: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        rms: bool,
        eps: float,
    ) -> Tensor:
        h, stats = modulate_norm_fwd(x, shift, scale, cu_seqlens, rms, eps, weight.dtype)
        asked, recompute = ctx.needs_input_grad[:3], ctx.needs_input_grad[4]
        kept = norm_kept(x, stats, shift, scale, cu_seqlens, asked, recompute)
        ctx.save_for_backward(*kept, weight if any(asked) else None)
        ctx.rms, ctx.eps = rms, eps
        return F.linear(h, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *kept, weight = ctx.saved_tensors
        asked, of_linear = ctx.needs_input_grad[:3], ctx.needs_input_grad[4:6]
        found: Sequence[Tensor | None] = (None,) * 4
        if any(asked):
            found = norm_gradients(grad @ weight, kept, ctx.rms, of_linear[0])
        elif of_linear[0]:
            found = None, None, None, _recomputed_norm(kept, ctx.rms, ctx.eps, grad.dtype)
        return *only_asked(asked, found[:3]), None, *linear_gradients(grad, found[3], *of_linear), None, None


class _AddGatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor,
        gate: Tensor,
        shift: Tensor,
        scale: Tensor,
        cu_seqlens: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        rms: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        x_new, h, stats = add_gated_norm_fwd(x, branch, gate, shift, scale, cu_seqlens, rms, eps, weight.dtype)
        asked, recompute = ctx.needs_input_grad[:5], ctx.needs_input_grad[6]
        kept = gated_kept(x_new, stats, branch, gate, shift, scale, cu_seqlens, asked, recompute)
        ctx.save_for_backward(*kept, weight if any(asked) else None)
        ctx.rms, ctx.eps = rms, eps
        ctx.set_materialize_grads(False)
        if not any(asked[:3]):
            ctx.mark_non_differentiable(x_new)
        return x_new, F.linear(h, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_new: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        *kept, weight = ctx.saved_tensors
        asked, of_linear = ctx.needs_input_grad[:5], ctx.needs_input_grad[6:8]
        if grad is None:  # the Linear's result is not used
            if grad_new is None:
                return (None,) * 10
            grad_h = torch.zeros_like(grad_new, dtype=weight.dtype)
            return *gated_gradients(grad_new, grad_h, kept, ctx.rms, asked)[:5], *[None] * 5
        found: Sequence[Tensor | None] = (None,) * 6
        if any(asked):
            found = gated_gradients(grad_new, grad @ weight, kept, ctx.rms, asked, of_linear[0])
        elif of_linear[0]:
            found = *found[:5], _recomputed_norm(kept, ctx.rms, ctx.eps, grad.dtype)
        return *found[:5], None, *linear_gradients(grad, found[5], *of_linear), None, None


def _recomputed_norm(kept: Sequence[Tensor | None], rms: bool, eps: float, dtype: torch.dtype) -> Tensor:
    """Return h once more from what `norm_kept` or `gated_kept` kept, in the forward kernel's own bits."""
    x, _, shift, scale, cu_seqlens = kept[:5]
    h: Tensor = modulate_norm_fwd(x, shift, scale, cu_seqlens, rms, eps, dtype)[0]
    return h


@public_op("modulate_norm_fwd", "modulate_norm_bwd")
def modulated_linear(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | nn.Module,
    bias: Tensor | None = None,
    *,
    norm: Norm = "layer",
    eps: float = 1e-6,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Return ``F.linear(modulate_norm(x, shift, scale), weight, bias)``; keeps x but not its norm for backward.

    Or ``linear(modulate_norm(x, shift, scale))`` of a module, which keeps the norm unless it is a plain `nn.Linear`.

    The norm is rounded once, to the dtype of the matmul: autocast's if enabled, else the dtype of ``weight``.
    Differentiable in x, shift, scale, weight and bias.

    Args:
        x: tokens, shape (B, K, D), or (N, D) with ``cu_seqlens``.
        shift: as in `modulate_norm`.
        scale: like ``shift``.
        weight: shape (E, D), or the Linear's module in place of weight and bias: anything but a plain `nn.Linear` (see
            `docs/kernels.md`) is called with the norm.
        bias: shape (E,); None for none, and beside a module.
        norm: as in `modulate_norm`.
        eps: as in `modulate_norm`.
        norm_weight: as in `modulate_norm`.
        norm_bias: as in `modulate_norm`.
        cu_seqlens: as in `modulate_norm`.
        impl: as in `modulate_norm`.

    Returns:
        Shape (B, K, E) or (N, E), in the dtype of the matmul.

    Raises:
        ValueError: shapes that do not fit, or inputs that the fused kernels do not support.
        BackendUnavailableError: no fused kernel on this device.
    """
    linear = weights_of(weight, bias)
    if isinstance(linear, nn.Module):
        h = modulate_norm(
            x, shift, scale, norm=norm, eps=eps, norm_weight=norm_weight, norm_bias=norm_bias, cu_seqlens=cu_seqlens,
            out_dtype=input_dtype(linear, x), impl=impl,
        )  # fmt: skip
        return cast(Tensor, linear(h))
    weight, bias = linear
    check_norm(norm, eps)
    check_tokens("x", x, cu_seqlens)
    check_devices(x.device, shift=shift, scale=scale, cu_seqlens=cu_seqlens)
    check_affine(x, norm_weight, norm_bias)
    check_linear(x, weight, bias)
    shift, scale = (modulation_of(name, t, x, cu_seqlens, 0) for name, t in (("shift", shift), ("scale", scale)))
    tensors = x, shift, scale, weight, bias, norm_weight, norm_bias
    if resolve_impl(impl, "modulate_norm_fwd", x.device, *tensors) == "reference":
        h = modulate_norm_reference(
            x, shift, scale, norm=norm, eps=eps, norm_weight=norm_weight, norm_bias=norm_bias, cu_seqlens=cu_seqlens,
            out_dtype=product_dtype(x.device, weight),
        )  # fmt: skip
        return F.linear(h, *product_operands(x.device, weight, bias))
    shift, scale = folded(x, shift, scale, norm_weight, norm_bias, cu_seqlens)
    rows = as_rows(x, cu_seqlens, {"shift": shift, "scale": scale})
    check_plain(weight, bias)
    check_dtype("weight", weight)
    y: Tensor = _ModulatedLinear.apply(  # type: ignore[no-untyped-call]
        rows.x, *rows.modulations, rows.cu_seqlens, *product_operands(x.device, weight, bias), norm == "rms", float(eps)
    )
    return y.view(*x.shape[:-1], weight.shape[0])


@public_op("add_gated_norm_fwd", "add_gated_norm_bwd")
def add_gated_linear(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | nn.Module,
    bias: Tensor | None = None,
    *,
    norm: Norm = "layer",
    eps: float = 1e-6,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """Return x' and ``F.linear(h, weight, bias)``, where ``x', h = add_gated_norm(x, branch, gate, shift, scale)``.

    Or x' and ``linear(h)`` of a module, as in `modulated_linear`.

    Keeps x' and branch for backward, but not the norm. Differentiable in all tensors but ``cu_seqlens``.

    Args:
        x: residual stream, shape (B, K, D), or (N, D) with ``cu_seqlens``.
        branch: same shape as ``x``.
        gate: as in `add_gated_norm`.
        shift: like ``gate``; None is 0.
        scale: like ``shift``.
        weight: shape (E, D), or the Linear's module in place of weight and bias: anything but a plain `nn.Linear` (see
            `docs/kernels.md`) is called with the norm.
        bias: shape (E,); None for none, and beside a module.
        norm: as in `add_gated_norm`.
        eps: as in `add_gated_norm`.
        norm_weight: as in `add_gated_norm`.
        norm_bias: as in `add_gated_norm`.
        cu_seqlens: as in `add_gated_norm`.
        impl: as in `add_gated_norm`.

    Returns:
        The new residual, in the dtype of ``x``, and the output of the Linear, shape (B, K, E) or (N, E), in the dtype
        of the matmul.

    Raises:
        ValueError: shapes that do not fit, or inputs that the fused kernels do not support.
        BackendUnavailableError: no fused kernel on this device.
    """
    linear = weights_of(weight, bias)
    if isinstance(linear, nn.Module):
        x, h = add_gated_norm(
            x, branch, gate, shift, scale, norm=norm, eps=eps, norm_weight=norm_weight, norm_bias=norm_bias,
            cu_seqlens=cu_seqlens, out_dtype=input_dtype(linear, x), impl=impl,
        )  # fmt: skip
        return x, linear(h)
    weight, bias = linear
    check_branch(x, branch, norm, eps, cu_seqlens)
    gate, shift, scale = gated_modulations(x, gate, shift, scale, cu_seqlens)
    check_affine(x, norm_weight, norm_bias)
    check_linear(x, weight, bias)
    tensors = x, branch, gate, shift, scale, weight, bias, norm_weight, norm_bias
    if resolve_impl(impl, "add_gated_norm_fwd", x.device, *tensors) == "reference":
        x, h = add_gated_norm_reference(
            x, branch, gate, shift, scale, norm=norm, eps=eps, norm_weight=norm_weight, norm_bias=norm_bias,
            cu_seqlens=cu_seqlens, out_dtype=product_dtype(x.device, weight),
        )  # fmt: skip
        return x, F.linear(h, *product_operands(x.device, weight, bias))
    shift, scale = folded(x, shift, scale, norm_weight, norm_bias, cu_seqlens)
    rows = branch_rows(x, branch, gate, shift, scale, cu_seqlens)
    check_plain(weight, bias)
    check_dtype("weight", weight)
    x_new, y = _AddGatedLinear.apply(  # type: ignore[no-untyped-call]
        *rows, *product_operands(x.device, weight, bias), norm == "rms", float(eps)
    )
    return x_new.view(x.shape), y.view(*x.shape[:-1], weight.shape[0])
