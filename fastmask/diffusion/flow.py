"""Rectified flow: straight paths from images to noise (arXiv 2209.03003), with the times of arXiv 2403.03206."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from fastmask.diffusion.process import Coefficients, Process, check_steps
from fastmask.fields import recorded

_MOST_LOGIT, _MOST_SHIFT = 8.0, 100.0
_LEAST = 1e-5  # distance of uniform times from 0 and 1, where the log-SNR is not finite


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RectifiedFlow(Process):
    """The process x_t = (1 - t) image + t noise, whose network predicts the velocity, noise - image."""

    name: ClassVar[str] = "flow"

    t_mean: float = recorded(0.0)
    """Mean of logit(t) in training."""
    t_std: float = recorded(1.0)
    """Standard deviation of logit(t) in training."""
    t_uniform: bool = recorded(False)
    """Draw t uniformly in training, in place of logit(t) normally; --t-mean and --t-std have no effect then."""
    shift: float = recorded(1.0)
    """Shift of times toward noise, in training and in sampling: t' = shift t / (1 + (shift - 1) t)."""

    def __post_init__(self) -> None:
        # Beyond these limits times round to 0 or 1 in fp32, where the loss or the log-SNR is not finite.
        if not abs(self.t_mean) <= _MOST_LOGIT:
            raise ValueError(f"t_mean must be between -{_MOST_LOGIT} and {_MOST_LOGIT}, not {self.t_mean}")
        if not 0 <= self.t_std <= _MOST_LOGIT / 4:
            raise ValueError(f"t_std must be between 0 and {_MOST_LOGIT / 4}, not {self.t_std}")
        if not 1 / _MOST_SHIFT <= self.shift <= _MOST_SHIFT:
            raise ValueError(f"shift must be between {1 / _MOST_SHIFT} and {_MOST_SHIFT:g}, not {self.shift}")

    def draw(self, normal: Tensor) -> Tensor:
        """Return logit-normal times (arXiv 2403.03206, equation 19) or uniform ones, shifted (equation 23)."""
        if self.t_uniform:
            t = torch.special.ndtr(normal).clamp(_LEAST, 1 - _LEAST)  # the distribution function makes them uniform
        else:
            t = (normal * self.t_std + self.t_mean).sigmoid()
        return self._shifted(t)

    def mix(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 - t and t."""
        return 1 - t, t

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return those of D = x - t F: the loss is |F - (noise - image)|^2."""
        one = torch.ones_like(t)
        return Coefficients(c_in=one, c_noise=t, c_skip=one, c_out=-t, weight=t.square().reciprocal())

    def time_at(self, level: Tensor) -> Tensor:
        """Return the times at which t / (1 - t) is the level."""
        return level / (1 + level)

    def times(self, num_steps: int) -> Tensor:
        """Return even times from 1 to 0, shifted."""
        check_steps(num_steps)
        return self._shifted(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64))

    def _shifted(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)
