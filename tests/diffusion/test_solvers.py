import math
from itertools import pairwise

import pytest
import torch
from util import GaussianDenoiser, small_net

from fastmask.diffusion import EDM, SOLVERS, draw_samples, sample
from fastmask.testing import relative_error


@pytest.mark.parametrize(("solver", "order", "largest"), [("heun", 2, 3e-3), ("euler", 1, 5e-2)])
def test_solver_approaches_the_exact_solution_at_its_order(solver, order, largest):
    noise, labels = torch.randn(2, 1, 4, 4).double(), torch.zeros(2, dtype=torch.int64)
    # dx/dsigma = x sigma / (sigma^2 + s^2), from sigma_max to 0.
    exact = noise * 80 * 0.5 / math.sqrt(0.5**2 + 80**2)
    errors = [
        relative_error(sample(GaussianDenoiser(), noise, labels, EDM().times(n), solver=solver), exact)
        for n in (21, 41, 81)
    ]
    assert errors[2] < largest
    for coarse, fine in pairwise(errors):
        assert order - 0.2 < math.log2(coarse / fine) < order + 0.2


def test_times_and_number_of_evaluations():
    net, noise, labels = GaussianDenoiser(), torch.randn(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    times = EDM().times(5, sigma_min=0.01, sigma_max=20, rho=3)
    levels = [(20 ** (1 / 3) + i / 4 * (0.01 ** (1 / 3) - 20 ** (1 / 3))) ** 3 for i in range(5)]
    assert times.dtype == torch.float64
    assert times.tolist() == pytest.approx([*levels, 0], rel=1e-14)
    sample(net, noise, labels, times)
    asked = [level for level in levels for _ in range(2)][1:]  # Heun looks at each level twice, at the first once
    assert len(net.asked) == 9
    for (dtype, t, _), level in zip(net.asked, asked, strict=True):
        assert dtype == torch.float32
        assert t.tolist() == pytest.approx([level] * 3, rel=1e-6)


@pytest.mark.parametrize("num_steps", [2, 3, 18, 40])
@pytest.mark.parametrize(("solver", "evaluations"), [("heun", lambda n: 2 * n - 1), ("euler", lambda n: n)])
def test_number_of_evaluations(solver, evaluations, num_steps):
    net = GaussianDenoiser()
    sample(net, torch.randn(1, 1, 2, 2), torch.tensor([0]), EDM().times(num_steps), solver=solver)
    assert len(net.asked) == evaluations(num_steps)


def test_a_solver_is_one_function(monkeypatch):
    def one_step(denoise, process, x, times):
        return denoise(x, times[0])

    monkeypatch.setitem(SOLVERS, "one-step", one_step)
    net, noise, labels = small_net(), torch.randn(2, 3, 8, 8), torch.tensor([0, 4])
    times = net.process.times(3)
    with torch.no_grad():
        denoised = net((times[0] * noise.double()).float(), times[:1].float().expand(2), labels).double()
    assert torch.equal(sample(net, noise, labels, times, solver="one-step"), denoised)
    ours, heun = (draw_samples(net, labels, seed=0, num_steps=3, solver=name) for name in ("one-step", "heun"))
    assert ours.shape == (2, 3, 8, 8)
    assert torch.equal(draw_samples(net, labels, seed=0, num_steps=9, solver="one-step"), ours)
    assert not torch.equal(ours, heun)
    assert torch.equal(draw_samples(net, labels, seed=0, num_steps=3), heun)


def test_an_unknown_solver():
    with pytest.raises(ValueError, match="unknown solver 'rk4': choose from heun, euler"):
        sample(GaussianDenoiser(), torch.randn(1, 1, 2, 2), torch.tensor([0]), EDM().times(3), solver="rk4")
    with pytest.raises(ValueError, match="unknown solver 'rk4'"):
        draw_samples(small_net(), torch.tensor([0]), seed=0, solver="rk4")
