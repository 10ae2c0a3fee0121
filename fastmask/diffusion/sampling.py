"""Sampling from a denoiser."""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from fastmask.diffusion.denoiser import Denoiser, check_labels
from fastmask.diffusion.guidance import guided
from fastmask.diffusion.solvers import SOLVERS
from fastmask.fields import check_at_least
from fastmask.kernels import random_normal

_LATENT_STREAM = 6  # stream of the counter-based generator; all streams are listed in draws.py


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Solver and guidance, with one set of defaults for training grids, sampling and evaluation."""

    solver: Literal["heun", "euler"] = "heun"
    """Solver of the probability flow ODE."""
    sample_steps: int = 40
    """Number of solver steps."""
    cfg_scale: float = 1.5
    """Classifier-free guidance scale; 1 disables guidance."""

    def check(self) -> None:
        """Raise a ValueError for the first invalid field."""
        check_at_least(self, sample_steps=2, cfg_scale=0)


@torch.no_grad()
def sample(
    net: Denoiser,
    noise: Tensor,
    labels: Tensor,
    times: Tensor,
    *,
    cfg_scale: float | None = None,
    solver: str = "heun",
) -> Tensor:
    """Integrate the probability flow ODE from unit noise, with classifier-free guidance.

    Args:
        net: the denoiser.
        noise: unit noise, shape (B, C, H, W).
        labels: int64, shape (B,).
        times: solver times, from `Process.times`, float64, shape (N + 1,).
        cfg_scale: guidance scale; None or 1 disables guidance.
        solver: a key of `SOLVERS`.

    Returns:
        Shape (B, C, H, W), float64: the state is in float64, the network runs in its own precision.

    Raises:
        ValueError: an unknown solver, labels of another shape or out of range, or guidance for a network without
            classes.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}: choose from {', '.join(SOLVERS)}")
    if labels.shape != noise.shape[:1]:
        raise ValueError(f"labels must have shape ({noise.shape[0]},) for this noise, not {tuple(labels.shape)}")
    if times.ndim != 1 or len(times) < 2 or not (times.diff() < 0).all() or times[-1] != 0:
        raise ValueError(f"times must fall to 0, in a tensor of shape (N + 1,), not {times.tolist()}")
    if cfg_scale is not None and not math.isfinite(cfg_scale):
        raise ValueError(f"cfg_scale must be a number, not {cfg_scale}")
    num_classes = net.model.num_classes
    if num_classes:
        check_labels(labels, num_classes)
    denoise = guided(net, labels, 1.0 if cfg_scale is None else cfg_scale, num_classes, net.model.pos_embed.dtype)
    times = times.to(noise.device)
    _, b = net.process.mix(times[0])
    return SOLVERS[solver](denoise, net.process, b * noise.double(), times)


def draw_samples(
    net: Denoiser,
    labels: Tensor,
    *,
    seed: int,
    num_steps: int = 40,
    cfg_scale: float | None = None,
    batch: int = 256,
    solver: str = "heun",
) -> Tensor:
    """Return one sample per label, drawn by `sample` in batches.

    Args:
        net: the denoiser.
        labels: int64, shape (N,).
        seed: seed of the noise; sample i depends on the seed and i only, not on the batch size.
        num_steps: number of solver steps.
        cfg_scale: guidance scale; None or 1 disables guidance.
        batch: batch size.
        solver: a key of `SOLVERS`.

    Returns:
        float32 on the CPU, shape (N, C, H, W).
    """
    if not len(labels) or batch < 1:
        raise ValueError(f"at least one label and a batch of at least 1 are needed, not {len(labels)} and {batch}")
    model = net.model
    device = model.pos_embed.device
    shape = (model.in_channels, model.input_size, model.input_size)
    drawn, times = [], net.process.times(num_steps)
    for start in range(0, len(labels), batch):
        part = labels[start : start + batch].to(device)
        index = torch.arange(start, start + len(part), device=device)
        noise = random_normal(seed, index, math.prod(shape), _LATENT_STREAM).view(-1, *shape)
        samples = sample(net, noise, part, times, cfg_scale=cfg_scale, solver=solver)
        drawn.append(samples.float().cpu())
    return torch.cat(drawn)
