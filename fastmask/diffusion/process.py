"""Affine diffusion processes, as functions of a time t: everything that training and sampling know of one.

A process mixes an image with unit noise and denoises through a network F:

    noised = a(t) image + b(t) noise
    D      = c_skip noised + c_out F(c_in noised; c_noise)
    loss   = weight |D - image|^2

a and b rise and fall with t so that a larger t is noisier. EDM (arXiv 2206.00364, table 1) and rectified flow
(arXiv 2209.03003) are processes of this form; `masked_loss`, the solvers and the guidance need nothing else.
"""

import abc
import dataclasses
from typing import ClassVar, NamedTuple

from torch import Tensor


class Coefficients(NamedTuple):
    """What a process multiplies at a time, each of shape (B,) and of the dtype of the times.

    Attributes:
        c_in: the noised image, as the network sees it.
        c_noise: the number that tells the network the time.
        c_skip: the noised image in the denoised one.
        c_out: the network's output in the denoised image.
        weight: the squared error of the denoised image in the loss.
    """

    c_in: Tensor
    c_noise: Tensor
    c_skip: Tensor
    c_out: Tensor
    weight: Tensor


def check_steps(num_steps: int) -> None:
    """Raise a ValueError for fewer than two steps of a solver."""
    if num_steps < 2:
        raise ValueError(f"num_steps must be at least 2, not {num_steps}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Process(abc.ABC):
    """One affine diffusion process. A subclass is a frozen dataclass whose fields are numbers that check themselves.

    A field whose metadata has an entry "fixed" cannot change when a run is resumed; the entry says why.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def draw(self, normal: Tensor) -> Tensor:
        """Return training times, shape (B,), for standard normal numbers of that shape."""

    @abc.abstractmethod
    def mix(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and b at times of shape (B,): the factors of the image and of the unit noise."""

    @abc.abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the coefficients at times above 0, shape (B,)."""

    @abc.abstractmethod
    def slope(self, x: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
        """Return dx/dt of the probability flow ODE at one time, shape ().

        Args:
            x: the state, shape (B, C, H, W).
            denoised: D(x; t), the same shape.
            t: the time, above 0.
        """

    @abc.abstractmethod
    def times(self, num_steps: int) -> Tensor:
        """Return the times of a solver of ``num_steps`` steps, float64, shape (num_steps + 1,), falling to 0.

        Raises:
            ValueError: fewer than two steps.
        """

    def noised(self, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return noised images, of their dtype; images and unit noise have shape (B, C, H, W), times (B,)."""
        a, b = (factor[:, None, None, None] for factor in self.mix(t))
        return (a * images + b * noise).to(images.dtype)

    def log_snr(self, t: Tensor) -> Tensor:
        """Return ln(a^2 / b^2), the logarithm of the signal-to-noise ratio, at times of any shape."""
        a, b = self.mix(t)
        return 2 * (a.log() - b.log())
