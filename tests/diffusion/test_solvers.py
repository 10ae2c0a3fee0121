import functools
import math
import typing
from itertools import pairwise

import pytest
import torch
from util import GaussianDenoiser, small_net

from fastmask.diffusion import EDM, SOLVERS, Denoiser, RectifiedFlow, Sampling, draw_batch, draw_samples, sample
from fastmask.diffusion.solvers import heun, stochastic_heun
from fastmask.kernels import random_normal
from fastmask.testing import relative_error


@pytest.mark.parametrize(("solver", "order", "largest"), [("heun", 2, 3e-3), ("euler", 1, 5e-2), ("dpmpp-2m", 2, 3e-3)])
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
@pytest.mark.parametrize(
    ("solver", "evaluations"), [("heun", lambda n: 2 * n - 1), ("euler", lambda n: n), ("dpmpp-2m", lambda n: n)]
)
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
    ours, heun = (
        draw_samples(net, labels, Sampling(sample_steps=3, solver=name, cfg_scale=1), seed=0)
        for name in ("one-step", "heun")
    )
    assert ours.shape == (2, 3, 8, 8)
    more = Sampling(sample_steps=9, solver="one-step", cfg_scale=1)
    assert torch.equal(draw_samples(net, labels, more, seed=0), ours)
    assert not torch.equal(ours, heun)


def test_an_unknown_solver():
    with pytest.raises(ValueError, match="unknown solver 'rk4': choose from heun, euler, dpmpp-2m"):
        sample(GaussianDenoiser(), torch.randn(1, 1, 2, 2), torch.tensor([0]), EDM().times(3), solver="rk4")
    with pytest.raises(ValueError, match="--solver must be one of heun, euler, dpmpp-2m, not 'rk4'"):
        draw_samples(small_net(), torch.tensor([0]), Sampling(solver="rk4"), seed=0)


def test_every_solver_is_a_choice_of_the_command_line():
    hints = typing.get_type_hints(Sampling)
    assert typing.get_args(hints["solver"]) == tuple(SOLVERS)


def test_dpm_solver_uses_the_last_two_evaluations():
    """The second-order term changes the result, and two steps, of which both are first-order, are exact in D."""
    net, noise, labels = GaussianDenoiser(), torch.randn(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    times = EDM().times(2)
    first = net(80 * noise, times[:1].expand(2), labels)
    state = 80 * noise.double() * times[1] / times[0] + (1 - times[1] / times[0]) * first
    exact = net(state, times[1:2].expand(2), labels)
    # The network's times are fp32.
    assert relative_error(sample(net, noise, labels, times, solver="dpmpp-2m"), exact) < 1e-5


PROCESSES = {"edm": EDM(), "flow": RectifiedFlow(), "shifted flow": RectifiedFlow(shift=3.0)}


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_no_churn_is_heun(process):
    net, noise = GaussianDenoiser(process=process), torch.randn(2, 1, 2, 2).double()
    denoise = lambda x, t: net(x, t.expand(2), torch.zeros(2, dtype=torch.int64))  # noqa: E731
    arguments = denoise, process, noise, process.times(6)
    unasked = lambda step: pytest.fail("noise was drawn")  # noqa: E731
    assert torch.equal(stochastic_heun(*arguments, churn=0.0, noise=unasked), heun(*arguments))


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("churn", [4.0, 1e9])
def test_churn_keeps_the_distribution(process, churn):
    """Normal data of deviation 0.5 around 0.3: the samples' mean and deviation, and that the noise was replaced."""
    count, steps = 20_000, 128
    start = random_normal(0, torch.arange(count), 1, 6).view(-1, 1, 1, 1).double()
    net = GaussianDenoiser(mean=(0.3,), process=process)
    fresh = lambda step: random_normal(0, torch.arange(count), 1, 8 + 256 * step).view(-1, 1, 1, 1)  # noqa: E731
    solver = functools.partial(stochastic_heun, churn=churn, noise=fresh)
    labels = torch.zeros(count, dtype=torch.int64)
    drawn = sample(net, start, labels, process.times(steps), solver=solver).flatten()
    # Five deviations of the mean and of the relative deviation of so many samples, and the steps' own error of 1 %.
    assert abs(float(drawn.mean()) - 0.3) < 5 * 0.5 / math.sqrt(count)
    assert abs(float(drawn.std()) / 0.5 - 1) < 5 / math.sqrt(2 * count) + 0.01
    assert float(torch.corrcoef(torch.stack([drawn, start.flatten()]))[0, 1]) < 0.15  # without churn it is 1


def test_churn_is_a_function_of_seed_index_and_step():
    net, labels, churned = small_net().double(), torch.tensor([0, 4, 1]), Sampling(sample_steps=4, churn=1.0)
    whole = draw_samples(net, labels, churned, seed=3)
    torch.testing.assert_close(draw_samples(net, labels, churned, seed=3, batch=1), whole, rtol=1e-6, atol=1e-6)
    second = draw_batch(net, labels[1:], churned, seed=3, first=1)
    torch.testing.assert_close(second, whole[1:], rtol=1e-6, atol=1e-6)
    without = draw_samples(net, labels, Sampling(sample_steps=4), seed=3)
    assert all(relative_error(a, b) > 0.05 for a, b in zip(without, whole, strict=True))
    flow = Denoiser(net.model, RectifiedFlow())
    assert draw_samples(flow, labels, churned, seed=3).isfinite().all()


def by_scheduler(scheduler, net, noise, steps, **set_timesteps):
    """Sample a denoiser, of scalar states, with a scheduler of diffusers, which preconditions by itself."""
    process, labels = net.process, torch.zeros(len(noise), dtype=torch.int64)
    scheduler.set_timesteps(steps, **set_timesteps)
    x = noise.double() * scheduler.init_noise_sigma if process.name == "edm" else noise.double()
    for i, timestep in enumerate(scheduler.timesteps):
        t = scheduler.sigmas[i].double()
        denoised = net(x, t.expand(len(x)), labels)
        coefficients = process.coefficients(t)
        raw = (denoised - coefficients.c_skip * x) / coefficients.c_out
        if process.name == "edm":
            scheduler.scale_model_input(x, timestep)
        x = scheduler.step(raw, timestep, x).prev_sample
    return x


@pytest.mark.parametrize(
    ("name", "solver", "process"),
    [
        ("EDMEulerScheduler", "euler", "edm"),
        ("EDMDPMSolverMultistepScheduler", "dpmpp-2m", "edm"),
        ("FlowMatchEulerDiscreteScheduler", "euler", "flow"),
        ("FlowMatchEulerDiscreteScheduler", "euler", "shifted flow"),
    ],
)
@pytest.mark.parametrize("steps", [2, 12])
def test_schedulers_of_diffusers_give_the_same(name, solver, process, steps):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    process, settings, arguments = PROCESSES[process], {}, {}
    if process.name == "flow":
        # Even times, which it shifts; by default its last time would be that of 1000 training steps.
        settings, arguments = {"shift": process.shift}, {"sigmas": torch.linspace(1, 0, steps + 1)[:-1].tolist()}
    net, noise = GaussianDenoiser(mean=(0.3,), process=process), torch.randn(4, 1, 2, 2)
    theirs = by_scheduler(getattr(diffusers, name)(**settings), net, noise, steps, **arguments)
    ours = sample(net, noise, torch.zeros(4, dtype=torch.int64), process.times(steps), solver=solver)
    # Their noise levels and coefficients are fp32, and near both ends of EDM's range they cancel.
    assert relative_error(theirs, ours) < 1e-4
