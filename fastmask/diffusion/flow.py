"""Rectified flow: straight paths from images to noise (arXiv 2209.03003), with the times of arXiv 2403.03206."""

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from fastmask.diffusion.process import Coefficients, Process, check_steps


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RectifiedFlow(Process):
    """The process x_t = (1 - t) image + t noise, whose network predicts the velocity, noise - image."""

    name: ClassVar[str] = "flow"

    t_mean: float = 0.0
    """Mean of logit(t) in training."""
    t_std: float = 1.0
    """Standard deviation of logit(t) in training."""
    shift: float = 1.0
    """Shift of times toward noise, in training and in sampling: t' = shift t / (1 + (shift - 1) t)."""

    def __post_init__(self) -> None:
        if not abs(self.t_mean) < math.inf:
            raise ValueError(f"t_mean must be a number, not {self.t_mean}")
        if not 0 <= self.t_std < math.inf:
            raise ValueError(f"t_std must be at least 0, not {self.t_std}")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift must be a number above 0, not {self.shift}")

    def draw(self, normal: Tensor) -> Tensor:
        """Return logit-normal times, shifted (arXiv 2403.03206, equations 19 and 23)."""
        return self._shifted((normal * self.t_std + self.t_mean).sigmoid())

    def mix(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 - t and t."""
        return 1 - t, t

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return those of D = x - t F: the loss is |F - (noise - image)|^2."""
        one = torch.ones_like(t)
        return Coefficients(c_in=one, c_noise=t, c_skip=one, c_out=-t, weight=t.square().reciprocal())

    def slope(self, x: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
        """Return the velocity (x - D) / t."""
        return (x - denoised) / t

    def times(self, num_steps: int) -> Tensor:
        """Return even times from 1 to 0, shifted."""
        check_steps(num_steps)
        return self._shifted(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64))

    def _shifted(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)
