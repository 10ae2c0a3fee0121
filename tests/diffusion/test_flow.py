import math
import re
from itertools import pairwise

import pytest
import torch
from scipy import stats
from util import GaussianDenoiser, batch_of, small_net

from fastmask.diffusion import (
    Denoiser,
    MaskedDenoising,
    Objective,
    RectifiedFlow,
    Sampling,
    draw_samples,
    sample,
    training_draws,
)
from fastmask.kernels import patchify
from fastmask.testing import assert_near, relative_error


def flow_net(**process):
    return Denoiser(small_net().model, RectifiedFlow(**process))


def test_straight_paths():
    images, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.0, 0.25, 1.0])
    noised = RectifiedFlow().noised(images, noise, t)
    assert torch.equal(noised[0], images[0])
    assert torch.equal(noised[2], noise[2])
    assert_near(noised[1], 0.75 * images[1] + 0.25 * noise[1])
    assert RectifiedFlow().log_snr(torch.tensor([0.25, 0.5])).tolist() == pytest.approx([2 * math.log(3), 0.0])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_of_training_are_logit_normal_and_shifted(shift):
    process = RectifiedFlow(t_mean=-0.3, t_std=0.8, shift=shift)
    t = process.draw(torch.randn(20_000))
    unshifted = t / (shift - (shift - 1) * t)
    logit = (unshifted.double() / (1 - unshifted.double())).log()
    assert stats.kstest(logit.numpy(), "norm", (-0.3, 0.8)).pvalue > 0.01


def test_uniform_times_of_training():
    process = RectifiedFlow(t_uniform=True, shift=3.0)
    t = process.draw(torch.randn(20_000)).double()
    assert stats.kstest((t / (3 - 2 * t)).numpy(), "uniform").pvalue > 0.01
    ends = RectifiedFlow(t_uniform=True).draw(torch.tensor([-20.0, 20.0]))
    assert ends.tolist() == pytest.approx([1e-5, 1 - 1e-5])
    assert process.log_snr(ends).isfinite().all()


def test_times_of_sampling_fall_to_zero():
    assert RectifiedFlow().times(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = RectifiedFlow(shift=3.0).times(4)  # t' = 3 t / (1 + 2 t)
    assert shifted.dtype == torch.float64
    assert shifted.tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])


@pytest.mark.parametrize("ends", [{"t_mean": -8.0, "t_std": 0.2, "shift": 0.01}, {"t_mean": 8.0, "shift": 100.0}])
def test_the_numbers_at_their_limits_are_finite(ends):
    process = RectifiedFlow(**ends)
    t = process.draw(torch.linspace(-3, 3, 101))
    assert process.log_snr(t).isfinite().all()
    assert all(c.isfinite().all() for c in process.coefficients(t))


@pytest.mark.parametrize(
    ("name", "values", "rule"),
    [
        ("t_mean", (-200.0, 9.0, math.inf, math.nan), "between -8.0 and 8.0"),
        ("t_std", (-0.1, 1e30, math.inf, math.nan), "between 0 and 2.0"),
        ("shift", (0.0, -1.0, 1e-30, 1e30, math.inf, math.nan), "between 0.01 and 100"),
    ],
)
def test_numbers_that_no_flow_has(name, values, rule):
    for value in values:
        with pytest.raises(ValueError, match=re.escape(f"{name} must be {rule}, not {value}")):
            RectifiedFlow(**{name: value})


def test_the_loss_is_the_error_of_the_velocity():
    """|F - (noise - image)|^2, averaged; the network sees x_t and t as they are."""
    net = flow_net().double()
    images, labels, _, noise = batch_of(net, dtype=torch.float64)
    t = torch.tensor([0.02, 0.5, 0.98], dtype=torch.float64)
    losses = Objective(net, [MaskedDenoising()])(images, labels, None, t, noise)
    raw = net.model(net.process.noised(images, noise, t), t, labels)
    exact = (raw - patchify(noise - images, 2)).square().mean((1, 2))
    torch.testing.assert_close(losses["loss"], exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("solver", "order", "fewest"), [("heun", 2, 40), ("euler", 1, 40), ("dpmpp-2m", 2, 160)])
def test_solvers_converge_at_their_order(solver, order, fewest):
    """For normal data the flow takes noise z to mean + deviation * z.

    The multistep method errs by log(N) / N^2 here: near 0 even times are wide steps in the log-SNR.
    """
    noise, labels = torch.randn(2, 1, 4, 4).double(), torch.tensor([0, 1])
    mean = torch.tensor([0.3, -0.2], dtype=torch.float64)
    exact = mean[:, None, None, None] + 0.5 * noise
    net = GaussianDenoiser(mean=(0.3, -0.2), process=RectifiedFlow())
    ends = [sample(net, noise, labels, net.process.times(n), solver=solver) for n in (fewest, 2 * fewest, 4 * fewest)]
    for coarse, fine in pairwise(relative_error(end, exact) for end in ends):
        assert order - 0.3 < math.log2(coarse / fine) < order + 0.3


def test_a_network_is_trained_and_sampled_by_it():
    net = flow_net(shift=2.0)
    images, labels, _, _ = batch_of(net)
    draws = training_draws(net.process, images, labels, length=16, keep=5, num_classes=5, seed=1, offset=0)
    losses = Objective(net, [MaskedDenoising()])(images, *draws)
    losses["loss"].mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    samples = draw_samples(net, labels, Sampling(sample_steps=4), seed=0)
    assert samples.isfinite().all()


def test_the_time_of_a_noise_level():
    process = RectifiedFlow(shift=3.0)
    times = process.times(9)[1:-1]
    torch.testing.assert_close(process.time_at(process.level(times)), times, rtol=1e-14, atol=0)
    assert process.level(torch.tensor(1.0)) == math.inf
