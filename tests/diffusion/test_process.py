"""A process of one's own: what the base class gives, and that the op and the solvers ask for no more."""

import dataclasses
import math
from typing import ClassVar

import pytest
import torch

from fastmask.diffusion.process import Coefficients, Process, check_steps
from fastmask.diffusion.solvers import SOLVERS
from fastmask.kernels import masked_loss, patchify
from fastmask.testing import assert_near, relative_error


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cosine(Process):
    """The variance-preserving process x_t = cos(t) image + sin(t) noise, whose network predicts the noise."""

    name: ClassVar[str] = "cosine"

    def draw(self, normal):
        return (normal.sigmoid() * 0.9 + 0.05) * math.pi / 2

    def mix(self, t):
        return t.cos(), t.sin()

    def coefficients(self, t):
        return Coefficients(torch.ones_like(t), t, 1 / t.cos(), -t.tan(), 1 / t.tan().square())

    def time_at(self, level):
        return level.atan()

    def slope(self, x, denoised, t):
        return -t.sin() * denoised + t.cos() * (x - t.cos() * denoised) / t.sin()

    def times(self, num_steps):
        check_steps(num_steps)
        return torch.linspace(math.pi / 2, 0, num_steps + 1, dtype=torch.float64)


def test_noised_images_and_their_signal_to_noise_ratio():
    images, noise, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0.25, 1.0])
    factors = [(math.cos(time), math.sin(time)) for time in t.tolist()]
    exact = torch.stack([a * images[i] + b * noise[i] for i, (a, b) in enumerate(factors)])
    assert_near(Cosine().noised(images, noise, t), exact)
    assert Cosine().noised(images.bfloat16(), noise, t).dtype == torch.bfloat16
    assert Cosine().log_snr(t).tolist() == pytest.approx([2 * math.log(a / b) for a, b in factors], abs=1e-6)


@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_the_loss_is_the_error_of_what_is_predicted(impl):
    """The weight is that of the noise: |F - noise|^2."""
    images, noise, raw = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.randn(3, 4, 8)
    process = Cosine()
    t = process.draw(torch.randn(3))
    _, _, *coefficients = process.coefficients(t)
    noised = process.noised(images, noise, t)
    denoising, _ = masked_loss(raw, images, noised, *coefficients, None, patch_size=2, impl=impl)
    exact = (raw.double() - patchify(noise, 2).double()).square().mean((1, 2))
    assert_near(denoising, exact, 4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_follow_it(solver):
    """If all data are one point, every path ends there."""
    point = torch.full((2, 1, 2, 2), 0.3, dtype=torch.float64)
    process, noise = Cosine(), torch.randn(2, 1, 2, 2, dtype=torch.float64)
    ends = [SOLVERS[solver](lambda x, t: point, process, noise, process.times(n)) for n in (20, 200)]
    errors = [relative_error(end, point) for end in ends]
    assert errors[1] < 1e-2
    assert errors[1] <= errors[0] / 5  # DPM-Solver++ is exact here
