"""EDM: preconditioning, training noise levels and sampler times (arXiv 2206.00364, table 1)."""

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from fastmask.diffusion.denoiser import Denoiser
from fastmask.diffusion.process import Coefficients, Process, check_steps
from fastmask.fields import fixed, recorded
from fastmask.models.maskdit import MaskDiT


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EDM(Process):
    """Variance-exploding process whose time is the noise level sigma."""

    name: ClassVar[str] = "edm"

    sigma_data: float = fixed(0.5, "the checkpoint's weights were trained with it")
    """Standard deviation of the data."""
    p_mean: float = recorded(-1.2)
    """Mean of ln(sigma) in training."""
    p_std: float = recorded(1.2)
    """Standard deviation of ln(sigma) in training."""

    def __post_init__(self) -> None:
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"sigma_data must be a number above 0, not {self.sigma_data}")
        if not abs(self.p_mean) < math.inf:
            raise ValueError(f"p_mean must be a number, not {self.p_mean}")
        if not 0 <= self.p_std < math.inf:
            raise ValueError(f"p_std must be at least 0, not {self.p_std}")

    def draw(self, normal: Tensor) -> Tensor:
        """Return log-normal noise levels."""
        return (normal * self.p_std + self.p_mean).exp()

    def mix(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 and sigma."""
        return torch.ones_like(t), t

    def log_snr(self, t: Tensor) -> Tensor:
        """Return -2 ln(sigma), without the logarithm of ones."""
        return -2 * t.log()

    def noised(self, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return images + sigma * noise, without a pass over the images to scale them by 1."""
        return (images + noise * t[:, None, None, None]).to(images.dtype)

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the preconditioning of table 1."""
        variance, data = t.square(), self.sigma_data**2
        total = variance + data
        return Coefficients(
            c_in=1 / total.sqrt(),
            c_noise=t.log() / 4,
            c_skip=data / total,
            c_out=(variance / total).sqrt() * self.sigma_data,
            weight=total / (variance * data),
        )

    def time_at(self, level: Tensor) -> Tensor:
        """Return the levels themselves."""
        return level

    def times(self, num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
        """Return the sampler's noise levels (equation 5) and 0, float64, shape (num_steps + 1,).

        Args:
            num_steps: number of levels above 0, at least 2.
            sigma_min: lowest level above 0.
            sigma_max: highest level.
            rho: exponent of the spacing; larger values concentrate steps near ``sigma_min``.

        Raises:
            ValueError: fewer than two steps, or levels that do not decrease.
        """
        check_steps(num_steps)
        if not (0 < sigma_min < sigma_max < math.inf and 0 < rho < math.inf):
            raise ValueError(
                f"noise levels must fall from sigma_max {sigma_max} to sigma_min {sigma_min}, by rho {rho}"
            )
        ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
        levels = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
        return torch.cat([levels, levels.new_zeros(1)])


class EDMPrecond(Denoiser):
    """`Denoiser` with EDM's process, with the name and arguments used by EDM.

    Args:
        model: the network F.
        sigma_data: standard deviation of the data.
    """

    def __init__(self, model: MaskDiT, sigma_data: float = 0.5) -> None:
        super().__init__(model, EDM(sigma_data=sigma_data))
