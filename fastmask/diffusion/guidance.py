"""Classifier-free guidance (arXiv 2207.12598)."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastmask.diffusion.solvers import Denoise


def guided(
    net: Callable[[Tensor, Tensor, Tensor], Tensor],
    labels: Tensor,
    cfg_scale: float,
    num_classes: int,
    dtype: torch.dtype,
) -> Denoise:
    """Return the guided denoiser D_none + scale * (D_label - D_none), for float64 states.

    Args:
        net: a `Denoiser` or a callable with its arguments.
        labels: int64, shape (B,).
        cfg_scale: guidance scale; 1 evaluates only D_label.
        num_classes: the label that means no label.
        dtype: input dtype of the network.

    Raises:
        ValueError: guidance for a network without classes.
    """
    if cfg_scale != 1 and not num_classes:
        raise ValueError("guidance needs a network with classes (num_classes above 0): leave cfg_scale out")
    none = torch.full_like(labels, num_classes)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        inputs, times = x.to(dtype), t.to(dtype).expand(x.shape[0])
        if cfg_scale == 1:
            return net(inputs, times, labels).double()
        both = net(inputs.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([labels, none])).double()
        labelled, unlabelled = both.chunk(2)
        return unlabelled + cfg_scale * (labelled - unlabelled)

    return denoise
