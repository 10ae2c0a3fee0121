"""Exponential moving averages (EMA) of the weights, used for sampling, and post-hoc EMA.

In addition to the standard EMA with constant decay there are EMAs with a power-function profile, whose snapshots allow
an EMA of any width to be reconstructed after training (arXiv 2312.02696, section 3).
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fastmask.fields import check_at_least, check_share, fixed, free

# Width for gamma = 0, the plain mean of all steps; wider profiles would weigh the past more.
WIDEST = 1 / math.sqrt(12)
# Maximum half-life relative to the steps done (warm-up of arXiv 2206.00364, appendix F.2).
_WARMUP = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EMAConfig:
    """Exponential moving averages (EMA) of the weights."""

    ema_decay: float = 0.9999
    """EMA decay per step; it warms up, so that a short run forgets the random initial weights too."""
    ema_widths: tuple[float, ...] = fixed((), "these averages began with the run")
    """Relative widths of additional power-function EMAs for post-hoc EMA, such as 0.05 0.1."""
    snapshot_every: int = free(0)
    """Steps between snapshots of these EMAs, all of which are kept. 0: with every checkpoint."""

    def check(self) -> None:
        """Raise a ValueError for the first invalid field."""
        check_at_least(self, snapshot_every=0)
        check_share(self, "ema_decay")
        for width in self.ema_widths:
            gamma_of(width)
        if len(set(self.ema_widths)) < len(self.ema_widths):
            raise ValueError(f"ema_widths must differ from one another, not {self.ema_widths}")


class EMA:
    """EMA of the parameters of a module, in fp32 and on its device.

    During warm-up the half-life is limited to a twentieth of the steps done, so that a short run forgets its random
    initial weights too.

    Args:
        module: module whose parameters are averaged; the EMA starts at their current values.
        decay: EMA decay after warm-up.
        warmup: whether to warm up; disable it when starting from trained weights, which should not be forgotten.

    Attributes:
        decay: decay of the current step.
        warmup: as above.
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
        """Update the EMA: average = decay * average + (1 - decay) * parameter."""
        parameters = [p.detach() for p in module.parameters()]
        torch._foreach_lerp_(list(self.weights.values()), parameters, 1 - self.decay)

    @contextlib.contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Swap the EMA weights into the module inside the block, without copying."""
        own = {name: p.data for name, p in module.named_parameters()}
        try:
            for name, parameter in module.named_parameters():
                parameter.data = self.weights[name]
            yield
        finally:
            for name, parameter in module.named_parameters():
                parameter.data = own[name]


class PowerEMA(EMA):
    """Power-function EMA: step s has a weight proportional to s^gamma, so the width is constant relative to the run.

    The decay is (1 - 1 / step)^(gamma + 1), which is 0 at the first step.

    Args:
        module: module whose parameters are averaged.
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
        ValueError: a width outside the valid range.
    """
    if not 0 < width <= WIDEST:
        raise ValueError(f"the relative width of an average must be above 0 and at most {WIDEST:.4f}, not {width}")
    low, high = 0.0, 2.0
    while _width_of(high) > width:
        high *= 2
    for _ in range(100):  # bisection to float64 precision
        middle = (low + high) / 2
        low, high = (middle, high) if _width_of(middle) > width else (low, middle)
    return (low + high) / 2


def posthoc_coefficients(snapshots: Sequence[tuple[float, int]], gamma: float, step: int) -> tuple[list[float], float]:
    """Return the coefficients that reconstruct an EMA from snapshots, and the relative residual.

    A least-squares fit of the target profile by the snapshots' profiles (section 3.2 of the paper), in float64.

    Args:
        snapshots: exponent and step of each snapshot.
        gamma: exponent of the target profile.
        step: last step of the target, at least the step of the newest snapshot.

    Returns:
        A coefficient per snapshot, and the norm of the residual relative to the norm of the target profile.
    """
    wanted = (gamma, step)
    system = torch.tensor([[_overlap(a, b) for b in snapshots] for a in snapshots], dtype=torch.float64)
    right = torch.tensor([_overlap(a, wanted) for a in snapshots], dtype=torch.float64)
    # Profiles of nearby steps are almost parallel; scaling to a unit diagonal improves the conditioning.
    scale = system.diagonal().rsqrt()
    solved = torch.linalg.lstsq(system * scale[:, None] * scale, right * scale, driver="gelsd").solution * scale
    missed = _overlap(wanted, wanted) - 2 * solved @ right + solved @ system @ solved
    return solved.tolist(), math.sqrt(max(0.0, float(missed)) / _overlap(wanted, wanted))


def _width_of(gamma: float) -> float:
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def _overlap(a: tuple[float, int], b: tuple[float, int]) -> float:
    """Return the integral of the product of two profiles, (gamma + 1) s^gamma / step^(gamma + 1) up to their steps."""
    (gamma_a, step_a), (gamma_b, step_b) = sorted((a, b), key=lambda profile: profile[1])
    # In terms of step_a / step_b <= 1, whose powers cannot overflow.
    ratio = (step_a / step_b) ** gamma_b
    return float((gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio / step_b)
