"""The discrete process of DDPM and DiT (arXiv 2006.11239, 2102.09672, 2212.09748), made continuous."""

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from fastmask.diffusion.process import Coefficients, Process, check_steps

_STEPS = 1000
_FIRST, _LAST = 1e-4, 0.02  # variances beta of the first and the last step, linear in between (arXiv 2006.11239, 4)
_SLOPE = (_LAST - _FIRST) / (_STEPS - 1)
_NEWTON = 3  # iterations; each squares the relative error of the first guess, 1e-2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VP(Process):
    """The process x = sqrt(alpha_bar) image + sqrt(1 - alpha_bar) noise, whose network predicts the noise.

    Its time is the noise level b/a = sqrt(1 / alpha_bar - 1), as in EDM, which falls to 0 at the image. The network is
    told the timestep k in 0 .. 999, which is exact at the integers and continuous in between: by the Euler-Maclaurin
    formula, the sum -ln(alpha_bar) over the steps up to k is smooth in k.
    """

    name: ClassVar[str] = "vp"

    def draw(self, normal: Tensor) -> Tensor:
        """Return the levels of uniform integer timesteps."""
        steps = (torch.special.ndtr(normal) * _STEPS).floor().clamp(max=_STEPS - 1)
        return self.level_of(steps).to(normal.dtype)

    def mix(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the square roots of alpha_bar and of 1 - alpha_bar."""
        a = (1 + t.square()).rsqrt()
        return a, t * a

    def log_snr(self, t: Tensor) -> Tensor:
        """Return -2 ln(level)."""
        return -2 * t.log()

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return those of D = (x - b F) / a: the loss is |F - noise|^2."""
        a, _ = self.mix(t)
        return Coefficients(
            c_in=torch.ones_like(t),
            c_noise=self.timestep(t).to(t.dtype),
            c_skip=1 / a,
            c_out=-t,
            weight=t.square().reciprocal(),
        )

    def slope(self, x: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
        """Return a^3 (noise - t D), since a = (1 + t^2)^(-1/2) has the derivative -t a^3, and b = t a has a^3."""
        a, b = self.mix(t)
        return a**3 * ((x - a * denoised) / b - t * denoised)

    def time_at(self, level: Tensor) -> Tensor:
        """Return the levels themselves."""
        return level

    def times(self, num_steps: int, *, rho: float = 7.0) -> Tensor:
        """Return the levels of timesteps 999 to 0, spaced as EDM's (arXiv 2206.00364, equation 5), and 0."""
        check_steps(num_steps)
        low, high = self.level_of(torch.tensor([0.0, _STEPS - 1], dtype=torch.float64)) ** (1 / rho)
        levels = (high + torch.linspace(0, 1, num_steps, dtype=torch.float64) * (low - high)) ** rho
        return torch.cat([levels, levels.new_zeros(1)])

    def level_of(self, timestep: Tensor) -> Tensor:
        """Return the noise levels of timesteps in [0, 999], float64, of any shape."""
        return _decay(timestep.double())[0].expm1().sqrt()

    def timestep(self, t: Tensor) -> Tensor:
        """Return the timesteps of noise levels above 0, float64, the inverse of `level_of`; limited to [0, 999]."""
        decay = t.double().square().log1p()
        # First guess: the sum of the betas alone, which is quadratic in k.
        linear = _FIRST + _SLOPE / 2
        k = ((linear**2 + 2 * _SLOPE * (decay - _FIRST).clamp(min=0)).sqrt() - linear) / _SLOPE
        for _ in range(_NEWTON):
            value, derivative = _decay(k)
            k = k - (value - decay) / derivative
        return k.clamp(0, _STEPS - 1)


def _decay(k: Tensor) -> tuple[Tensor, Tensor]:
    """Return -ln(alpha_bar), the sum of f(s) = -ln(1 - beta_s) over s = 0 .. k, and its derivative in k, float64.

    The sum is the integral of f, half of its values at both ends and a twelfth of the difference of its derivatives
    there; the next term of the formula is below 1e-16.
    """
    beta = _FIRST + _SLOPE * k
    log, first = torch.log1p(-beta), math.log1p(-_FIRST)
    # -ln(1 - beta) has the integral beta + (1 - beta) ln(1 - beta).
    integral = (beta + (1 - beta) * log - (_FIRST + (1 - _FIRST) * first)) / _SLOPE
    slope = _SLOPE / (1 - beta)
    value = integral - (log + first) / 2 + (slope - _SLOPE / (1 - _FIRST)) / 12
    return value, -log + slope / 2 + slope**2 / 12
