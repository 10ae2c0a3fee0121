"""GELU and Linear, the second half of a transformer's MLP, with GELU recomputed in backward.

    y = gelu(x) W^T + b,  gelu(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))

Plain PyTorch keeps both x and gelu(x), each 4 D per token, which is the largest part of a block's activation memory.
Here only x is kept, and backward recomputes gelu(x) in the same pass over x as its gradient.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastmask.kernels._dispatch import Impl, check_impl, define_op, public_op, resolve_impl
from fastmask.kernels._layout import check_dtype, native_rows
from fastmask.kernels._matmul import (
    check_linear,
    check_plain,
    input_dtype,
    linear_gradients,
    product_dtype,
    product_operands,
    weights_of,
)


def gelu_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Reference for `gelu_linear` in plain PyTorch; same arguments."""
    dtype = product_dtype(x.device, weight)
    return F.linear(_gelu(x, dtype), *product_operands(x.device, weight, bias))


def _gelu(x: Tensor, dtype: torch.dtype) -> Tensor:
    return F.gelu(x.to(torch.promote_types(x.dtype, dtype)), approximate="tanh").to(dtype)


gelu_fwd = define_op(
    "gelu_fwd(Tensor x, ScalarType? out_dtype=None) -> Tensor",
    fake=lambda x, out_dtype=None: torch.empty_like(x, dtype=out_dtype),
    launcher="gelu_linear:launch_fwd",
    native=native_rows,
)
gelu_bwd = define_op(
    "gelu_bwd(Tensor grad, Tensor x) -> (Tensor, Tensor)",
    fake=lambda grad, x: (torch.empty_like(x), torch.empty_like(grad)),
    launcher="gelu_linear:launch_bwd",
)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_x or of_weight else None, weight if of_x else None)
        return F.linear(gelu_fwd(x, weight.dtype), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, *of_linear = ctx.needs_input_grad
        grad_x = hidden = None
        if of_x:
            grad_x, hidden = gelu_bwd(grad @ weight, x)
        elif of_linear[0]:
            hidden = gelu_fwd(x, grad.dtype)
        return grad_x, *linear_gradients(grad, hidden, *of_linear)


@public_op("gelu_fwd", "gelu_bwd")
def gelu_linear(
    x: Tensor, weight: Tensor | nn.Module, bias: Tensor | None = None, *, impl: Impl | None = None
) -> Tensor:
    """Return ``F.linear(F.gelu(x, approximate="tanh"), weight, bias)``, or ``linear(F.gelu(...))`` of a module.

    Keeps only x for backward. GELU is computed in fp32 and rounded once to the dtype of the matmul: autocast's if
    enabled, else the dtype of ``weight``. Differentiable in x, weight and bias.

    Args:
        x: shape (..., D); copied first if not contiguous.
        weight: shape (E, D), or the Linear's module in place of weight and bias: anything but a plain `nn.Linear` (see
            `docs/kernels.md`) is called.
        bias: shape (E,); None for none, and beside a module.
        impl: "fused" (float32, bfloat16, float16), "reference", or None for the device's default.

    Returns:
        Shape (..., E), in the dtype of the matmul.

    Raises:
        ValueError: shapes that do not fit, or inputs that the fused kernels do not support.
        BackendUnavailableError: no fused kernel on this device.
    """
    check_impl(impl)
    linear = weights_of(weight, bias)
    if isinstance(linear, nn.Module):
        return cast(Tensor, linear(_gelu(x, input_dtype(linear, x))))
    weight, bias = linear
    check_linear(x, weight, bias)
    if resolve_impl(impl, "gelu_fwd", x.device, x, weight, bias) == "reference":
        return gelu_linear_reference(x, weight, bias)
    check_plain(weight, bias)
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_dtype(name, tensor)
    weight, bias = product_operands(x.device, weight, bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y: Tensor = _GeluLinear.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], weight.shape[0])
