"""The CUDA C++ candidates that `make cuda` builds; Triton's kernel stays until a GPU has measured one as the faster."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmask.kernels.add_gated_norm import _AddGatedNorm, branch_rows

_PATH = "FASTMASK_NATIVE_CUDA"
MISSING = f"not built: make cuda, then set {_PATH} to the path that it prints"


@functools.cache
def load() -> str:
    """Load the candidates, and return why they are not there; empty if they are."""
    path = os.environ.get(_PATH)
    if path:
        torch.ops.load_library(path)
    return "" if path else MISSING


def candidate(function: Callable[..., Any], device: torch.device) -> dict[str, Callable[..., Any] | str]:
    """Return a variant for a bench's `others`, or why it is missing; on a CPU none, as there is nothing to choose."""
    return {"cuda": load() or function} if device.type == "cuda" else {}


class _WithCandidate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        return _AddGatedNorm.forward(ctx, *args)

    @staticmethod
    def backward(ctx: Any, grad_new: Tensor, grad_h: Tensor) -> tuple[Tensor | None, ...]:
        x_new, stats, *rest = ctx.saved_tensors
        backward = torch.ops.fastmask_cuda.add_gated_norm_bwd
        grads = backward(grad_new, grad_h.contiguous(), x_new, stats, *rest, ctx.rms, False)
        return *grads[:5], None, None, None, None


def add_gated_norm(
    x: Tensor,
    branch: Tensor,
    *modulations: Tensor,
    norm: str = "layer",
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Return what `fastmask.kernels.add_gated_norm` does, with the candidate's gradients."""
    rows = branch_rows(x, branch, *modulations, cu_seqlens)
    return tuple(t.view(x.shape) for t in _WithCandidate.apply(*rows, norm == "rms", eps, out_dtype or x.dtype))


def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Tensor,
    rates: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    averages: Sequence[Sequence[Tensor]],
    copies: Sequence[Tensor] = (),
    factor: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Do what `fastmask.kernels.adamw_ema` does, by the candidate."""
    flat = [t for average in averages for t in average]
    lists = (params, grads, exp_avgs, exp_avg_sqs, flat, copies, steps)
    torch.ops.fastmask_cuda.adamw_ema(*lists, lr, rates, factor, found_inf, *betas, eps, weight_decay)
