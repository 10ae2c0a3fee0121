"""Solvers of the probability flow ODE, from the highest time of a process down to 0.

A solver is a function of a denoiser, a process, a state and times. To add one, write the function and list it in
`SOLVERS`.
"""

import itertools
from collections.abc import Callable

from torch import Tensor

from fastmask.diffusion.process import Process

Denoise = Callable[[Tensor, Tensor], Tensor]
Solver = Callable[[Denoise, Process, Tensor, Tensor], Tensor]


def euler(denoise: Denoise, process: Process, x: Tensor, times: Tensor) -> Tensor:
    """Integrate to the last time with first-order steps.

    Args:
        denoise: returns D(x; t) for a state of shape (B, C, H, W) and a time of shape ().
        process: gives dx/dt.
        x: the state at the first time.
        times: decreasing to 0, shape (N + 1,).
    """
    for t, t_next in itertools.pairwise(times):
        x = x + (t_next - t) * process.slope(x, denoise(x, t), t)
    return x


def heun(denoise: Denoise, process: Process, x: Tensor, times: Tensor) -> Tensor:
    """Integrate to the last time with second-order steps (arXiv 2206.00364, algorithm 1); arguments as in `euler`.

    The last step is first-order, since the slope is undefined at time 0: 2 N - 1 evaluations in total.
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
