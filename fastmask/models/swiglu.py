"""SwiGLU (arXiv 2002.05202, section 2): a gated hidden layer, with its activation recomputed in backward.

    y = (silu(a) * b) W^T + c,  [a, b] = x,  silu(a) = a / (1 + e^-a)

Plain PyTorch keeps x, silu(a) and silu(a) * b, which is 4 M values per token for M hidden ones; here only x is kept,
2 M values. All computation but the matmul is in fp32, rounded once to the dtype of the matmul.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastmask.kernels._matmul import input_dtype, linear_gradients, product_operands, weights_of


def swiglu_width(width: int) -> int:
    """Return M, the number of hidden values.

    8/3 of the width gives its three matrices the weights of the two of 4 D (arXiv 2002.05202, section 3.1); it is
    rounded up to a multiple of 8, for 16-bit matmuls.
    """
    return 8 * -(-width // 3)


class _SwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_x or of_weight else None, weight if of_x else None)
        return F.linear(_activated(x, weight.dtype), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, *of_linear = ctx.needs_input_grad
        if not of_x:
            hidden = _activated(x, grad.dtype) if of_linear[0] else None
            return None, *linear_gradients(grad, hidden, *of_linear)
        gate, value = _halves(x)
        activated, grad_hidden = F.silu(gate), (grad @ weight).to(gate.dtype)
        # The hidden values are not bound to a name, which would hold them to the end.
        gradients = linear_gradients(grad, (activated * value).to(weight.dtype) if of_linear[0] else None, *of_linear)
        # In place, and rounded before they are joined: what is held here is the peak of a step's memory.
        grad_value = activated.mul_(grad_hidden).to(x.dtype)
        grad_gate = torch.ops.aten.silu_backward(grad_hidden.mul_(value), gate).to(x.dtype)
        return torch.cat([grad_gate, grad_value], dim=1), *gradients


def swiglu_linear(x: Tensor, weight: Tensor | nn.Module, bias: Tensor | None = None) -> Tensor:
    """Return ``F.linear(F.silu(a) * b, weight, bias)`` of ``a, b = x.chunk(2, -1)``; keeps only x for backward.

    Args:
        x: shape (..., 2 M).
        weight: shape (D, M); or the module in place of weight and bias, which is called where it is more than a Linear.
        bias: shape (D,), or None.

    Returns:
        Shape (..., D), in the dtype of the matmul.
    """
    weights = weights_of(weight, bias)
    if isinstance(weights, nn.Module):
        called: Tensor = weights(_activated(x, input_dtype(weights, x)))
        return called
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _SwigluLinear.apply(rows, *product_operands(x.device, *weights))  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], weights[0].shape[0])


def _activated(x: Tensor, dtype: torch.dtype) -> Tensor:
    gate, value = _halves(x)
    return (F.silu(gate) * value).to(dtype)


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    """Return the gate and the value in at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
