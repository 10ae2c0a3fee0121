"""Solvers of the probability flow ODE, from the noisiest time of a process down to 0.

A solver is a function of a denoiser, a process, a state and the times; `SOLVERS` lists them by name. To add one, write
the function and its row.
"""

import itertools
from collections.abc import Callable

from torch import Tensor

from fastmask.diffusion.process import Process

Denoise = Callable[[Tensor, Tensor], Tensor]
Solver = Callable[[Denoise, Process, Tensor, Tensor], Tensor]


def euler(denoise: Denoise, process: Process, x: Tensor, times: Tensor) -> Tensor:
    """Return the state at the last time by steps of first order.

    Args:
        denoise: returns D(x; t) for a state of shape (B, C, H, W) and a time of shape ().
        process: gives dx/dt.
        x: the state at the first time.
        times: falling, shape (N + 1,), the last one 0.
    """
    for t, t_next in itertools.pairwise(times):
        x = x + (t_next - t) * process.slope(x, denoise(x, t), t)
    return x


def heun(denoise: Denoise, process: Process, x: Tensor, times: Tensor) -> Tensor:
    """Return the state at the last time by steps of second order (arXiv 2206.00364, algorithm 1); args as `euler`.

    The last step, to time 0 where the slope is not defined, is of first order: 2 N - 1 evaluations in all.
    """
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        slope = process.slope(x, denoise(x, t), t)
        x_next = x + (t_next - t) * slope
        if i < len(times) - 2:
            slope_next = process.slope(x_next, denoise(x_next, t_next), t_next)
            x_next = x + (t_next - t) * (slope + slope_next) / 2
        x = x_next
    return x


SOLVERS: dict[str, Solver] = {"heun": heun, "euler": euler}
