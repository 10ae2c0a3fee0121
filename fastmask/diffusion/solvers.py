"""Solvers from the highest time of a process down to 0: of the probability flow ODE, and EDM's stochastic sampler.

A solver is a function of a denoiser, a process, a state and times. To add one, write the function and list it in
`SOLVERS`. Times are on the CPU: a number that decides what is computed must not wait for the device.
"""

import itertools
import math
from collections.abc import Callable

from torch import Tensor

from fastmask.diffusion.process import Process

Denoise = Callable[[Tensor, Tensor], Tensor]
Solver = Callable[[Denoise, Process, Tensor, Tensor], Tensor]

_MAX_CHURN = math.sqrt(2) - 1  # largest relative increase of the noise level in a step (arXiv 2206.00364, algorithm 2)
_PURE_NOISE = 1e4  # level from which on no noise is added: the state holds nothing else


def euler(denoise: Denoise, process: Process, x: Tensor, times: Tensor) -> Tensor:
    """Integrate to the last time with first-order steps.

    Args:
        denoise: returns D(x; t) for a state of shape (B, C, H, W) and a time of shape ().
        process: gives dx/dt.
        x: the state at the first time.
        times: decreasing to 0, shape (N + 1,), on the CPU.
    """
    for t, t_next in itertools.pairwise(times):
        x = x + (t_next - t) * process.slope(x, denoise(x, t), t)
    return x


def heun(denoise: Denoise, process: Process, x: Tensor, times: Tensor) -> Tensor:
    """Integrate to the last time with second-order steps (arXiv 2206.00364, algorithm 1); arguments as in `euler`.

    The last step is first-order, since the slope is undefined at time 0: 2 N - 1 evaluations in total.
    """
    for t, t_next in itertools.pairwise(times):
        x = _heun_step(denoise, process, x, t, t_next)
    return x


def dpmpp_2m(denoise: Denoise, process: Process, x: Tensor, times: Tensor) -> Tensor:
    """Integrate by DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2); arguments as in `euler`.

    A second-order multistep method in half the log-SNR, with one evaluation per step. A step solves the linear part
    exactly and extrapolates D from the last two evaluations; the first and the last step take D as constant, the last
    since its log-SNR is infinite.
    """
    before: Tensor | None = None
    width_before = times.new_tensor(math.inf)
    for t, t_next in itertools.pairwise(times):
        denoised = denoise(x, t)
        (a, b), (a_next, b_next) = process.mix(t), process.mix(t_next)
        width = (process.log_snr(t_next) - process.log_snr(t)) / 2
        data = denoised
        if before is not None and b_next > 0:
            data = denoised + width / (2 * width_before) * (denoised - before)
        # The paper's alpha (1 - exp(-h)), in a form that is finite at both ends.
        x = b_next / b * x + (a_next - a * b_next / b) * data
        before, width_before = denoised, width
    return x


def stochastic_heun(
    denoise: Denoise, process: Process, x: Tensor, times: Tensor, *, churn: float, noise: Callable[[int], Tensor]
) -> Tensor:
    """Sample by EDM's stochastic sampler (arXiv 2206.00364, algorithm 2, with S_noise 1 at every level).

    Each step first adds noise, which raises the noise level sigma = b/a by a factor 1 + min(S_churn / N, sqrt(2) - 1):
    the rescaled state x/a gets noise of variance sigma_hat^2 - sigma^2. A step of `heun` follows, from the raised level
    to the next time. At levels above 1e4 nothing is added.

    Args:
        denoise: as in `euler`.
        process: as in `euler`; it also inverts the noise level.
        x: as in `euler`.
        times: as in `euler`.
        churn: S_churn, at least 0; 0 is `heun`.
        noise: returns the unit noise of a step, counted from 0, of the shape of ``x``.
    """
    raised = 1 + min(churn / (len(times) - 1), _MAX_CHURN)
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        level = process.level(t)
        if raised > 1 and level < _PURE_NOISE:
            t_raised = process.time_at(raised * level)
            (a, _), (a_raised, _) = process.mix(t), process.mix(t_raised)
            x = a_raised / a * x + a_raised * level * math.sqrt(raised**2 - 1) * noise(i)
            t = t_raised
        x = _heun_step(denoise, process, x, t, t_next)
    return x


def _heun_step(denoise: Denoise, process: Process, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Return the state at the next time; first-order if that is 0."""
    slope = process.slope(x, denoise(x, t), t)
    x_next = x + (t_next - t) * slope
    if t_next > 0:
        slope_next = process.slope(x_next, denoise(x_next, t_next), t_next)
        x_next = x + (t_next - t) * (slope + slope_next) / 2
    return x_next


SOLVERS: dict[str, Solver] = {"heun": heun, "euler": euler, "dpmpp-2m": dpmpp_2m}
