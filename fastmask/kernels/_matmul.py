"""Shared code of ops that end in a matmul: dtypes, gradients, checks."""

import torch
from torch import Tensor

from fastmask.kernels._layout import check_devices


def product_dtype(device: torch.device, weight: Tensor) -> torch.dtype:
    """Return the dtype of a matmul: autocast's if it is enabled for the device, else the dtype of the weight."""
    if weight.dtype == torch.float64 or device.type == "meta":  # autocast ignores the one, and does not know the other
        return weight.dtype
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype


def product_operands(device: torch.device, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias in the dtype of the matmul."""
    dtype = product_dtype(device, weight)
    return weight.to(dtype), bias.to(dtype)


def linear_gradients(
    grad: Tensor, rows: Tensor | None, weight_asked: bool, bias_asked: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of weight and bias of ``rows W^T + b``, None for one that is not asked for.

    Args:
        grad: gradient of the product, shape (N, E).
        rows: shape (N, D); read for the weight's gradient alone.
        weight_asked: whether the weight requires a gradient.
        bias_asked: whether the bias does.
    """
    grad_weight = grad.t() @ rows if weight_asked and rows is not None else None
    return grad_weight, grad.sum(0) if bias_asked else None


def check_linear(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise a ValueError unless weight (E, D) and bias (E,) fit x (..., D)."""
    check_devices(x.device, weight=weight, bias=bias)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight must have shape (E, {x.shape[-1]}) for x of shape {tuple(x.shape)}, not {tuple(weight.shape)}"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), not {tuple(bias.shape)}")
