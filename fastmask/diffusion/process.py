"""Affine diffusion processes: the interface that training and sampling use.

A process mixes an image with unit noise at a time t, and denoises with a network F:

    noised = a(t) image + b(t) noise
    D      = c_skip noised + c_out F(c_in noised; c_noise)
    loss   = weight |D - image|^2

The noise level b/a rises with t. EDM (arXiv 2206.00364, table 1) and rectified flow
(arXiv 2209.03003) are processes of this form; `masked_loss`, the solvers and the guidance need nothing else.
"""

import abc
import dataclasses
from typing import ClassVar, NamedTuple

from torch import Tensor


class Coefficients(NamedTuple):
    """Coefficients of a process at given times, each of shape (B,) and of the dtype of the times.

    Attributes:
        c_in: scale of the noised image in the network's input.
        c_noise: time conditioning of the network.
        c_skip: scale of the noised image in the denoised one.
        c_out: scale of the network's output in the denoised image.
        weight: weight of the squared error in the loss.
    """

    c_in: Tensor
    c_noise: Tensor
    c_skip: Tensor
    c_out: Tensor
    weight: Tensor


def check_steps(num_steps: int) -> None:
    """Raise a ValueError for fewer than two solver steps."""
    if num_steps < 2:
        raise ValueError(f"num_steps must be at least 2, not {num_steps}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Process(abc.ABC):
    """An affine diffusion process. Subclasses are frozen dataclasses of numbers, validated in ``__post_init__``.

    A resumed run can change those fields that are `fastmask.fields.recorded`, such as how training times are drawn.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def draw(self, normal: Tensor) -> Tensor:
        """Map standard normal draws, shape (B,), to training times of the same shape."""

    @abc.abstractmethod
    def mix(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and b, the factors of image and noise, at times of shape (B,)."""

    @abc.abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the coefficients at times above 0, shape (B,)."""

    @abc.abstractmethod
    def time_at(self, level: Tensor) -> Tensor:
        """Return the times of finite noise levels b/a, of any shape: the inverse of `level`."""

    @abc.abstractmethod
    def times(self, num_steps: int) -> Tensor:
        """Return decreasing solver times that end at 0, float64, shape (num_steps + 1,).

        Raises:
            ValueError: fewer than two steps.
        """

    def noised(self, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return noised images in the dtype of ``images``; images and unit noise are (B, C, H, W), times (B,)."""
        a, b = (factor[:, None, None, None] for factor in self.mix(t))
        return (a * images + b * noise).to(images.dtype)

    def slope(self, x: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
        """Return dx/dt of the probability flow ODE at one time, shape ().

        (x - D) / t is a' D + b' (x - a D) / b for b(t) = t and a(t) = 1 - k t, whose paths are straight: k = 0 is EDM,
        k = 1 rectified flow. Other processes override it.

        Args:
            x: the state, shape (B, C, H, W).
            denoised: D(x; t), the same shape.
            t: the time, above 0.
        """
        return (x - denoised) / t

    def level(self, t: Tensor) -> Tensor:
        """Return the noise level b/a at times of any shape, infinite where a is 0."""
        a, b = self.mix(t)
        return b / a

    def log_snr(self, t: Tensor) -> Tensor:
        """Return the log-SNR, ln(a^2 / b^2), at times of any shape."""
        a, b = self.mix(t)
        return 2 * (a.log() - b.log())
