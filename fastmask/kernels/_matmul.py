"""Shared code of ops that end in a Linear: its module or weights, dtypes, gradients, checks."""

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as _module

from fastmask.kernels._layout import check_devices, check_tensors

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)


def weights_of(weight: Tensor | nn.Module, bias: Tensor | None) -> nn.Module | tuple[Tensor, Tensor | None]:
    """Return weight and bias of a Linear, or its module where that computes more than ``x W^T + b``.

    Args:
        weight: a weight (E, D), or the module in its place.
        bias: shape (E,) or None; None beside a module, which has its own.
    """
    if not isinstance(weight, nn.Module):
        return weight, bias
    if bias is not None:
        raise ValueError(f"bias must be None beside a module, {type(weight).__name__}, which has its own")
    if not _is_plain_linear(weight):
        return weight
    return weight.weight, weight.bias


def _is_plain_linear(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether calling a module is nothing but `F.linear` of an ordinary weight and bias.

    False for a subclass or wrapper (LoRA, parametrised, quantised), one with hooks of its own or of all modules
    (FSDP2, tensor parallelism, offloading, pruning), one whose `forward` was replaced, and other weights: DTensor,
    tensor subclasses, integers, 8-bit floats.
    """
    if type(linear) is not nn.Linear or "forward" in linear.__dict__:
        return False
    if (
        linear._forward_hooks
        or linear._forward_pre_hooks
        or linear._backward_hooks
        or linear._backward_pre_hooks
        or _module._has_any_global_hook()  # type: ignore[no-untyped-call]
    ):
        return False
    return all(type(t) in _PLAIN and t.dtype in _DTYPES for t in (linear.weight, linear.bias) if t is not None)


def input_dtype(module: nn.Module, x: Tensor) -> torch.dtype:
    """Return the dtype in which a module that is called takes its input.

    As for a weight, that of the module's first floating parameter; under autocast, which the module applies itself, and
    without such a parameter, the dtype of ``x``.
    """
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return next((t.dtype for t in module.parameters() if t.dtype in _DTYPES), x.dtype)


def product_dtype(device: torch.device, weight: Tensor) -> torch.dtype:
    """Return the dtype of a matmul: autocast's if it is enabled for the device, else the dtype of the weight."""
    if weight.dtype == torch.float64 or device.type == "meta":  # autocast ignores the one, and does not know the other
        return weight.dtype
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype


def product_operands(device: torch.device, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias in the dtype of the matmul."""
    dtype = product_dtype(device, weight)
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def linear_gradients(
    grad: Tensor, rows: Tensor | None, weight_asked: bool, bias_asked: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of weight and bias of ``rows W^T + b``, None for one that is not asked for.

    Args:
        grad: gradient of the output, shape (N, E).
        rows: shape (N, D); read for the weight's gradient alone.
        weight_asked: whether the weight requires a gradient.
        bias_asked: whether the bias does.
    """
    grad_weight = grad.t() @ rows if weight_asked and rows is not None else None
    return grad_weight, grad.sum(0) if bias_asked else None


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise a ValueError unless weight (E, D) and bias (E,) or None are of floats and fit x (..., D)."""
    check_tensors(x=x)
    check_devices(x.device, weight=weight, bias=bias)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{name} must be float32, bfloat16, float16 or float64, not {tensor.dtype}: pass the module that holds "
                f"it in place of weight and bias"
            )
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight must have shape (E, {x.shape[-1]}) for x of shape {tuple(x.shape)}, not {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), not {tuple(bias.shape)}")


def check_plain(weight: Tensor, bias: Tensor | None) -> None:
    """Raise a ValueError for a tensor subclass, whose values a kernel would read as those of an ordinary tensor."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and type(tensor) not in _PLAIN:
            raise ValueError(
                f"the fused kernels take an ordinary tensor as {name}, not {type(tensor).__name__}: pass the module "
                f'that holds it in place of the weight, or impl="reference"'
            )
