"""Sampling from a denoiser."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fastmask.diffusion.denoiser import Denoiser
from fastmask.diffusion.guidance import ALL_LEVELS, guided
from fastmask.diffusion.solvers import SOLVERS, Denoise, Solver, stochastic_heun
from fastmask.kernels import random_normal
from fastmask.models.condition import Condition, count_of, moved, part_of

# Streams of the counter-based generator; all streams are listed in draws.py.
_LATENT_STREAM, _CHURN_STREAM = 6, 8

Callback = Callable[[Tensor, Tensor, Tensor], None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Solver and guidance, with one set of defaults for training grids, sampling and evaluation."""

    solver: Literal["heun", "euler", "dpmpp-2m"] = "heun"
    """Solver of the probability flow ODE: heun (two evaluations of the network per step), euler, or DPM-Solver++(2M)
    (second-order too, one evaluation per step)."""
    sample_steps: int = 40
    """Number of solver steps."""
    cfg_scale: float = 1.5
    """Classifier-free guidance scale; 1 disables guidance."""
    guidance_interval: tuple[float, ...] = ()
    """Two noise levels sigma, low and high, between which guidance applies, such as 0.28 2.9; steps outside take one
    evaluation for a guided step's two. Default: all levels."""
    guidance: Literal["label", "path-drop"] = "label"
    """The weak model of guidance: the network without a label, or also without its middle path (network sprint)."""
    churn: float = 0.0
    """Noise added in every step (S_churn of EDM's stochastic sampler, solver heun); 0 is deterministic."""

    def check(self) -> None:
        """Raise a ValueError for the first invalid field; it names the flag."""
        if self.solver not in SOLVERS:
            raise ValueError(f"--solver must be one of {', '.join(SOLVERS)}, not {self.solver!r}")
        if self.sample_steps < 2:
            raise ValueError(f"--sample-steps must be at least 2, not {self.sample_steps}")
        for flag, value in (("--cfg-scale", self.cfg_scale), ("--churn", self.churn)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{flag} must be a number of at least 0, not {value}")
        if self.churn and self.solver != "heun":
            raise ValueError(f"--churn belongs to solver heun, not {self.solver}: leave one of them out")
        if self.guidance not in ("label", "path-drop"):
            raise ValueError(f"--guidance must be label or path-drop, not {self.guidance!r}")
        if self.guidance == "path-drop" and self.cfg_scale == 1:
            raise ValueError("--guidance path-drop is guidance, which --cfg-scale 1 disables: leave one of them out")
        given = self.guidance_interval
        if given and not (len(given) == 2 and 0 <= given[0] < given[1]):
            shown = " ".join(f"{level:g}" for level in given)
            raise ValueError(f"--guidance-interval must be two noise levels, 0 or more, that rise, not {shown}")
        if given and self.cfg_scale == 1:
            raise ValueError("--guidance-interval limits guidance, which --cfg-scale 1 disables: leave one of them out")

    @property
    def interval(self) -> tuple[float, float]:
        """Noise levels (low, high] in which guidance applies."""
        return (self.guidance_interval[0], self.guidance_interval[1]) if self.guidance_interval else ALL_LEVELS

    def unguided(self) -> "Sampling":
        """Return the same without guidance, for a network without classes."""
        return dataclasses.replace(self, cfg_scale=1.0, guidance_interval=(), guidance="label")


@torch.no_grad()
def sample(
    net: Denoiser,
    noise: Tensor,
    condition: Condition,
    times: Tensor,
    *,
    cfg_scale: float | None = None,
    interval: tuple[float, float] = ALL_LEVELS,
    guide: Denoiser | None = None,
    path_drop: bool = False,
    solver: str | Solver = "heun",
    callback: Callback | None = None,
) -> Tensor:
    """Integrate from unit noise to images, with guidance.

    Args:
        net: the denoiser.
        noise: unit noise, shape (B, C, H, W).
        condition: what the network is told: labels, int64, shape (B,).
        times: solver times, from `Process.times`, float64, shape (N + 1,).
        cfg_scale: guidance scale; None or 1 disables guidance.
        interval: noise levels (low, high] in which guidance applies.
        guide: a weaker model that guides, in place of the network without a condition.
        path_drop: whether the network without its middle path guides, see `guided`.
        solver: a key of `SOLVERS`, or a function like these.
        callback: called after each evaluation with the time, the state and the denoised images; for pictures.

    Returns:
        Shape (B, C, H, W), float64: the state is in float64, the network runs in its own precision.

    Raises:
        ValueError: an unknown solver, labels of another shape or out of range, guidance for a network without a
            condition, or a guide that does not fit the network.
    """
    if isinstance(solver, str):
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}: choose from {', '.join(SOLVERS)}")
        solver = SOLVERS[solver]
    net.model.check_condition(condition, len(noise))
    if times.ndim != 1 or len(times) < 2 or not (times.diff() < 0).all() or times[-1] != 0:
        raise ValueError(f"times must fall to 0, in a tensor of shape (N + 1,), not {times.tolist()}")
    if cfg_scale is not None and not math.isfinite(cfg_scale):
        raise ValueError(f"cfg_scale must be a number, not {cfg_scale}")
    scale = 1.0 if cfg_scale is None else cfg_scale
    denoise = guided(net, condition, scale, interval=interval, guide=guide, path_drop=path_drop)
    times = times.cpu()
    _, b = net.process.mix(times[0])
    return solver(_with_callback(denoise, callback) if callback else denoise, net.process, b * noise.double(), times)


def draw_batch(
    net: Denoiser,
    condition: Condition,
    sampling: Sampling,
    *,
    seed: int,
    first: int = 0,
    guide: Denoiser | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Return samples ``first``, ``first`` + 1, .., one for each in the condition, drawn in one batch.

    All randomness is a function of the seed, the index of the sample and the step. So a sample does not depend on the
    batch, but for the rounding of matmuls, which can differ between batch sizes; in batches of one size, at the same
    position, it has the same bits.

    Args:
        net: the denoiser.
        condition: what the network is told: labels, int64, shape (B,), on any device.
        sampling: solver and guidance.
        seed: seed of the noise.
        first: index of the first sample.
        guide: as in `sample`.
        callback: as in `sample`.

    Returns:
        float32 on the network's device, shape (B, C, H, W).

    Raises:
        ValueError: an invalid field of ``sampling``, and as in `sample`.
    """
    sampling.check()
    model = net.model
    shape = (model.in_channels, model.input_size, model.input_size)
    device = model.pos_embed.device
    index = torch.arange(first, first + count_of(condition), device=device)

    def normal(stream: int) -> Tensor:
        return random_normal(seed, index, math.prod(shape), stream).view(-1, *shape)

    solver: str | Solver = sampling.solver
    if sampling.churn:
        fresh = functools.partial(_churn_noise, normal)
        solver = functools.partial(stochastic_heun, churn=sampling.churn, noise=fresh)
    drawn = sample(
        net,
        normal(_LATENT_STREAM),
        moved(condition, device),
        net.process.times(sampling.sample_steps),
        cfg_scale=sampling.cfg_scale,
        interval=sampling.interval,
        guide=guide,
        path_drop=sampling.guidance == "path-drop",
        solver=solver,
        callback=callback,
    )
    return drawn.float()


def draw_samples(
    net: Denoiser,
    condition: Condition,
    sampling: Sampling,
    *,
    seed: int,
    batch: int = 256,
    guide: Denoiser | None = None,
) -> Tensor:
    """Return one sample for each in the condition, drawn by `draw_batch` in batches.

    Args:
        net: the denoiser.
        condition: what the network is told: labels, int64, shape (N,).
        sampling: solver and guidance.
        seed: seed of the noise.
        batch: batch size.
        guide: as in `sample`.

    Returns:
        float32 on the CPU, shape (N, C, H, W).
    """
    count = count_of(condition)
    if not count or batch < 1:
        raise ValueError(f"at least one sample and a batch of at least 1 are needed, not {count} and {batch}")
    parts = [
        draw_batch(net, part_of(condition, first, first + batch), sampling, seed=seed, first=first, guide=guide).cpu()
        for first in range(0, count, batch)
    ]
    return torch.cat(parts)


def _churn_noise(normal: Callable[[int], Tensor], step: int) -> Tensor:
    return normal(_CHURN_STREAM + 256 * step)


def _with_callback(denoise: Denoise, callback: Callback) -> Denoise:
    def reporting(x: Tensor, t: Tensor) -> Tensor:
        denoised = denoise(x, t)
        callback(t, x, denoised)
        return denoised

    return reporting
