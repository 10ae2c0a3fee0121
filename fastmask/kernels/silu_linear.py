"""adaLN modulation: SiLU and Linear from the conditioning vector to shift, scale and gate.

    y = silu(x) W^T + b,  silu(x) = x / (1 + e^-x)

x has one row per sample and W is large, so for a small batch the op is bound by reading W (forward and backward) and
writing its gradient. BLAS libraries repack W for many rows first; the native CPU kernel reads it once, without a copy.
In all other cases PyTorch's matmul is faster and used here too. Backward keeps only x and recomputes silu(x); it uses
PyTorch's matmul where x or W is frozen, and so adds up in another order there.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastmask.kernels._asked import only_asked
from fastmask.kernels._dispatch import Impl, chosen_impl, define_op, public_op, takes_native
from fastmask.kernels._layout import check_tensors, native_rows
from fastmask.kernels._matmul import check_linear, check_plain, linear_gradients, product_dtype, weights_of

MAX_ROWS = 16  # above this a GEMM is as fast


def silu_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Reference for `silu_linear` in plain PyTorch; same arguments."""
    return F.linear(F.silu(x), weight, bias)


def _native(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    few = 0 < x.shape[0] <= MAX_ROWS and product_dtype(x.device, weight) == torch.float32
    return few and native_rows(x) and all(t is None or t.dtype == torch.float32 for t in (x, weight, bias))


silu_linear_fwd = define_op(
    "silu_linear_fwd(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    fake=lambda x, weight, bias: x.new_empty((x.shape[0], weight.shape[0])),
    native=_native,
)
silu_linear_bwd = define_op(
    "silu_linear_bwd(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad, x, weight: (torch.empty_like(x), torch.empty_like(weight), weight.new_empty(weight.shape[0])),
)


class _SiluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_x or of_weight else None, weight if of_x else None)
        y: Tensor = silu_linear_fwd(x, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        if of_x and of_weight:
            return tuple(only_asked((True, True, of_bias), silu_linear_bwd(grad.contiguous(), x, weight)))
        grad_x = torch.ops.aten.silu_backward(grad @ weight, x) if of_x else None
        return grad_x, *linear_gradients(grad, F.silu(x) if of_weight else None, of_weight, of_bias)


@public_op("silu_linear_fwd", "silu_linear_bwd", otherwise="PyTorch's matmul: its own kernel is native, for a CPU")
def silu_linear(
    x: Tensor, weight: Tensor | nn.Module, bias: Tensor | None = None, *, impl: Impl | None = None
) -> Tensor:
    """Return ``F.linear(F.silu(x), weight, bias)``, or ``linear(F.silu(x))`` of a module.

    Differentiable in x, weight and bias. The native kernel computes in fp32.

    Args:
        x: conditioning vectors, shape (B, D).
        weight: shape (E, D), or the Linear's module in place of weight and bias: anything but a plain `nn.Linear` (see
            `docs/kernels.md`) is called.
        bias: shape (E,); None for none, and beside a module.
        impl: "reference"; "fused" and None use the native kernel where it is faster (on a CPU, up to 16 samples in
            float32 without autocast), and PyTorch's matmul otherwise.

    Returns:
        Shape (B, E), in the dtype of the matmul.

    Raises:
        ValueError: shapes that do not fit, or an unknown ``impl``.
    """
    check_tensors(x=x)
    if x.ndim != 2:
        raise ValueError(f"x must have shape (B, D), not {tuple(x.shape)}")
    impl = chosen_impl(impl)
    linear = weights_of(weight, bias)
    if isinstance(linear, nn.Module):
        return cast(Tensor, linear(F.silu(x)))
    weight, bias = linear
    check_linear(x, weight, bias)
    if impl == "reference" or not takes_native("silu_linear_fwd", x.device, x, weight, bias):
        return silu_linear_reference(x, weight, bias)
    check_plain(weight, bias)
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    y: Tensor = _SiluLinear.apply(*(t.contiguous() for t in (x, weight, bias)))  # type: ignore[no-untyped-call]
    return y
