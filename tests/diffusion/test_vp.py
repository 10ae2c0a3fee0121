import math
from itertools import pairwise

import pytest
import torch
from scipy import stats
from util import GaussianDenoiser, batch_of, small_net

from fastmask.diffusion import (
    VP,
    Denoiser,
    MaskedDenoising,
    Objective,
    Sampling,
    draw_samples,
    sample,
    training_draws,
)
from fastmask.kernels import patchify
from fastmask.testing import assert_near, relative_error


def alpha_bar():
    """The products of 1 - beta over the thousand steps, float64."""
    return (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


def test_integer_timesteps_have_the_published_levels():
    steps, exact = torch.arange(1000), alpha_bar()
    levels = VP().level_of(steps)
    torch.testing.assert_close(levels, (1 / exact - 1).sqrt(), rtol=1e-9, atol=0)
    a, b = VP().mix(levels)
    torch.testing.assert_close(a, exact.sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(b, (1 - exact).sqrt(), rtol=1e-9, atol=0)
    torch.testing.assert_close(VP().timestep(levels), steps.double(), rtol=0, atol=1e-6)
    # In fp32 a level has a relative error of 6e-8, and ln(level) changes by at least 2e-3 per timestep.
    torch.testing.assert_close(VP().timestep(levels.float()), steps.double(), rtol=0, atol=1e-4)


def test_timesteps_are_continuous_and_stay_in_their_range():
    steps = torch.linspace(0, 999, 7777, dtype=torch.float64)
    levels = VP().level_of(steps)
    assert (levels.diff() > 0).all()
    torch.testing.assert_close(VP().timestep(levels), steps, rtol=0, atol=1e-6)
    assert VP().timestep(torch.tensor([1e-6, 1e4])).tolist() == [0.0, 999.0]


def test_times_of_training_are_uniform_integers():
    t = VP().draw(torch.randn(50_000))
    assert t.dtype == torch.float32
    steps = VP().timestep(t)
    assert (steps - steps.round()).abs().max() < 1e-4
    assert stats.chisquare(torch.histc(steps.round(), 50, 0, 1000).numpy()).pvalue > 0.01
    ends = VP().timestep(VP().draw(torch.tensor([-40.0, 40.0])))
    assert ends.tolist() == pytest.approx([0.0, 999.0], abs=1e-4)


def test_times_of_sampling_fall_from_the_last_timestep_to_zero():
    times = VP().times(5)
    assert times.dtype == torch.float64
    assert (times.diff() < 0).all()
    assert VP().timestep(times[[0, 4]]).tolist() == pytest.approx([999.0, 0.0], abs=1e-6)
    assert times[-1] == 0
    assert VP().mix(times[-1:]) == (1, 0)


def test_the_loss_is_the_error_of_the_noise():
    """|F - noise|^2, averaged; the network sees x and the timestep as they are."""
    net = Denoiser(small_net().model, VP()).double()
    images, labels, _, noise = batch_of(net, dtype=torch.float64)
    steps = torch.tensor([3.0, 500.0, 998.0], dtype=torch.float64)
    t = net.process.level_of(steps)
    losses = Objective(net, [MaskedDenoising()])(images, labels, None, t, noise)
    kept = alpha_bar()[steps.long()][:, None, None, None]
    raw = net.model(kept.sqrt() * images + (1 - kept).sqrt() * noise, steps, labels)
    exact = (raw - patchify(noise, 2)).square().mean((1, 2))
    torch.testing.assert_close(losses["loss"], exact, rtol=1e-8, atol=0)


@pytest.mark.parametrize(("solver", "order"), [("heun", 2), ("euler", 1), ("dpmpp-2m", 2)])
def test_solvers_converge_at_their_order(solver, order):
    """For normal data of deviation s, paths keep (x/a - mean) / sqrt(s^2 + level^2).

    The last step leaves timestep 0, of level 0.01, in one step whatever their number: the finest solution has it too.
    """
    noise, labels = torch.randn(2, 1, 4, 4).double(), torch.tensor([0, 1])
    net = GaussianDenoiser(mean=(0.3, -0.2), process=VP())
    mean = torch.tensor([0.3, -0.2], dtype=torch.float64)[:, None, None, None]
    top = float(VP().times(2)[0])
    exact = mean + 0.5 / math.hypot(0.5, top) * (top * noise - mean)
    finest = sample(net, noise, labels, VP().times(2000))
    assert relative_error(finest, exact) < 1e-3
    ends = [sample(net, noise, labels, VP().times(n), solver=solver) for n in (40, 80, 160)]
    for coarse, fine in pairwise(relative_error(end, finest) for end in ends):
        assert order - 0.3 < math.log2(coarse / fine) < order + 0.3


def test_the_slope_is_the_derivative_of_a_path():
    process, t = VP(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    image, noise = torch.randn(2, 1, 2, 2).double(), torch.randn(2, 1, 2, 2).double()

    def path(t):
        return process.noised(image, noise, t.expand(2))

    exact = torch.autograd.functional.jacobian(path, t)
    assert_near(process.slope(path(t.detach()), image, t.detach()), exact)
    levels = process.level(VP().times(9)[:-1])
    torch.testing.assert_close(process.time_at(levels), VP().times(9)[:-1], rtol=1e-14, atol=0)


def test_a_network_is_trained_and_sampled_by_it():
    net = Denoiser(small_net().model, VP())
    images, labels, _, _ = batch_of(net)
    draws = training_draws(net.process, images, labels, length=16, keep=5, drop=net.model.drop, seed=1, offset=0)
    losses = Objective(net, [MaskedDenoising()])(images, *draws)
    losses["loss"].mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert draw_samples(net, labels, Sampling(sample_steps=4), seed=0).isfinite().all()


def test_it_compiles_in_one_graph():
    compiled = torch.compile(VP().coefficients, fullgraph=True, backend="eager")
    t = torch.rand(5) + 0.1
    assert all(torch.equal(a, b) for a, b in zip(compiled(t), VP().coefficients(t), strict=True))
