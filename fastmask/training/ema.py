"""Exponential moving averages of the weights, which samples are drawn with.

Beside the published average of constant decay there are averages with a power-function profile, from snapshots of which
an average of any other width is put together afterwards (arXiv 2312.02696, section 3).
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

# Of the profile of gamma = 0, a plain mean of all steps: no power function above it falls towards the past.
WIDEST = 1 / math.sqrt(12)
# Longest half-life of an average, relative to the steps done: the warm-up of arXiv 2206.00364, appendix F.2.
_WARMUP = 0.05


class EMA:
    """Averaged parameters of a module, in fp32 and on its device.

    The average warms up: at a step of training its half-life is at most a twentieth of the steps done, so that the
    random initial weights are forgotten in a short run too.

    Args:
        module: whose parameters are averaged; the average starts at their present values.
        decay: share of the average that stays at each update, once warmed up.
        warmup: whether it warms up; one that starts from trained weights should not forget them.

    Attributes:
        decay: the same, of the present step.
        warmup: see above.
    """

    def __init__(self, module: nn.Module, decay: float, *, warmup: bool = True) -> None:
        self.decay = self._longest = decay
        self.warmup = warmup
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in module.named_parameters()}

    def begin_step(self, step: int) -> None:
        """Set the decay of a step, counted from 1: min(decay, 0.5^(1 / h)) with a half-life h of 0.05 step."""
        if self.warmup:
            self.decay = min(self._longest, 0.5 ** (1 / (_WARMUP * step)))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average toward the module: average = decay * average + (1 - decay) * parameter."""
        parameters = [p.detach() for p in module.parameters()]
        torch._foreach_lerp_(list(self.weights.values()), parameters, 1 - self.decay)

    @contextlib.contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Let the module compute with the averaged weights inside the block, without copying."""
        own = {name: p.data for name, p in module.named_parameters()}
        try:
            for name, parameter in module.named_parameters():
                parameter.data = self.weights[name]
            yield
        finally:
            for name, parameter in module.named_parameters():
                parameter.data = own[name]


class PowerEMA(EMA):
    """An average in which the parameters of step s weigh as s^gamma: relative to the run it stays as wide as it is.

    Its decay is (1 - 1 / step)^(gamma + 1): 0 at the first step.

    Args:
        module: whose parameters are averaged.
        width: standard deviation of the profile relative to the length of the run, in (0, 0.288].
    """

    def __init__(self, module: nn.Module, width: float) -> None:
        super().__init__(module, 0.0)
        self.width, self.gamma = width, gamma_of(width)

    def begin_step(self, step: int) -> None:
        """Set the decay of a step, counted from 1."""
        self.decay = float((1 - 1 / step) ** (self.gamma + 1))


def gamma_of(width: float) -> float:
    """Return the exponent of the power-function profile of a relative width.

    width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), which falls as gamma grows.

    Raises:
        ValueError: no profile has that width.
    """
    if not 0 < width <= WIDEST:
        raise ValueError(f"the relative width of an average must be above 0 and at most {WIDEST:.4f}, not {width}")
    low, high = 0.0, 2.0
    while _width_of(high) > width:
        high *= 2
    for _ in range(100):  # by halves, to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if _width_of(middle) > width else (low, middle)
    return (low + high) / 2


def posthoc_coefficients(snapshots: Sequence[tuple[float, int]], gamma: float, step: int) -> tuple[list[float], float]:
    """Return how to add snapshots up to an average that was never tracked, and what the sum misses of it.

    The coefficients minimise the squared distance between the sum of the snapshots' profiles and the wanted profile
    (the paper's section 3.2), in float64.

    Args:
        snapshots: exponent and step of each.
        gamma: the exponent wanted.
        step: where the wanted average ends, at least the step of the newest snapshot used.

    Returns:
        A coefficient for each snapshot, and the norm of what is missed, relative to that of the wanted profile.
    """
    wanted = (gamma, step)
    system = torch.tensor([[_overlap(a, b) for b in snapshots] for a in snapshots], dtype=torch.float64)
    right = torch.tensor([_overlap(a, wanted) for a in snapshots], dtype=torch.float64)
    # Profiles of near steps are almost alike: without a scale of their own the system would be badly conditioned.
    scale = system.diagonal().rsqrt()
    solved = torch.linalg.lstsq(system * scale[:, None] * scale, right * scale, driver="gelsd").solution * scale
    missed = _overlap(wanted, wanted) - 2 * solved @ right + solved @ system @ solved
    return solved.tolist(), math.sqrt(max(0.0, float(missed)) / _overlap(wanted, wanted))


def _width_of(gamma: float) -> float:
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def _overlap(a: tuple[float, int], b: tuple[float, int]) -> float:
    """Return the integral of the product of two profiles, (gamma + 1) s^gamma / step^(gamma + 1) up to their steps."""
    (gamma_a, step_a), (gamma_b, step_b) = sorted((a, b), key=lambda profile: profile[1])
    # In terms of step_a / step_b <= 1, which no power overflows.
    ratio = (step_a / step_b) ** gamma_b
    return float((gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio / step_b)
