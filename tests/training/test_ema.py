import math

import pytest
import torch
from torch import nn

from fastmask.training.ema import EMA, PowerEMA, gamma_of, posthoc_coefficients


def test_average_is_the_weighted_sum_of_all_steps():
    module = nn.Linear(3, 2).double()
    ema = EMA(module, decay=0.9)
    expected = module.weight.detach().clone()
    for _ in range(20):
        with torch.no_grad():
            module.weight.add_(torch.randn(2, 3, dtype=torch.float64))
        ema.update(module)
        expected = 0.9 * expected + 0.1 * module.weight.detach()
    torch.testing.assert_close(ema.weights["weight"], expected, rtol=1e-12, atol=1e-12)


def test_applied_swaps_in_the_average_and_gives_the_weights_back():
    module = nn.Linear(3, 2)
    ema = EMA(module, decay=0.5)
    own = module.weight.detach().clone()
    ema.weights["weight"].add_(1)
    with ema.applied(module):
        torch.testing.assert_close(module.weight.detach(), own + 1)
    assert torch.equal(module.weight, own)


def test_weights_come_back_when_the_block_fails():
    module = nn.Linear(3, 2)
    ema = EMA(module, decay=0.5)
    own = module.weight.detach().clone()
    ema.weights["weight"].add_(1)
    with pytest.raises(RuntimeError, match="inside"), ema.applied(module):
        raise RuntimeError("inside")
    assert torch.equal(module.weight, own)


def walk(steps, seed=0):
    """Yield a module that moves as weights do in training: fast at first, with noise that stays."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(40, 5).double().requires_grad_(False)
    for step in range(1, steps + 1):
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / step**0.5 + 0.01)
        yield step, module


def test_an_average_warms_up():
    ema = EMA(torch.nn.Linear(1, 1), decay=0.9999)
    decays = []
    for step in (1, 20, 200, 10_000, 138_000, 139_000, 10**6):
        ema.begin_step(step)
        decays.append(ema.decay)
    assert decays == sorted(decays)
    assert decays[0] < 1e-5, "the initial weights are forgotten at once"
    assert decays[1:4] == pytest.approx([0.5, 0.5**0.1, 0.5**0.002])  # half-lives of 1, 10 and 500 steps
    assert decays[4] < 0.9999
    assert decays[5:] == [0.9999, 0.9999]  # whose half-life is 6931 steps


def test_an_average_of_trained_weights_keeps_its_decay():
    ema = EMA(torch.nn.Linear(1, 1), decay=0.9999, warmup=False)
    ema.begin_step(1)
    assert ema.decay == 0.9999


def test_the_average_of_a_short_run_has_forgotten_how_it_began():
    module = torch.nn.Linear(1, 1, bias=False).double()
    ema = EMA(module, decay=0.9999)
    ema.weights["weight"].fill_(1000.0)  # as far away as random weights are
    for step in range(1, 41):
        ema.begin_step(step)
        ema.update(module)
    assert float(ema.weights["weight"] - module.weight) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.28])
def test_a_power_average_is_the_weighted_sum_of_all_steps(width):
    gamma = gamma_of(width)
    assert math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2) == pytest.approx(width, rel=1e-12)
    steps, average, seen = 400, None, []
    for step, module in walk(steps):
        average = average or PowerEMA(module, width)
        average.begin_step(step)
        average.update(module)
        seen.append(module.weight.clone())
    # The weights of the recursion, each step's share times what later steps leave of it.
    share, left = [], 1.0
    for step in range(steps, 0, -1):
        decay = (1 - 1 / step) ** (gamma + 1)
        share.append(left * (1 - decay))
        left *= decay
    assert left == 0
    expected = sum(w * t for w, t in zip(reversed(share), seen, strict=True))
    torch.testing.assert_close(average.weights["weight"], expected, rtol=1e-12, atol=1e-12)
    # And these are the profile s^gamma, of that relative width.
    at = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    share = torch.tensor(share[::-1], dtype=torch.float64)
    mean = (share * at).sum()
    assert float((share * (at - mean) ** 2).sum().sqrt()) == pytest.approx(width, rel=0.02)


@pytest.mark.parametrize("width", [0.06, 0.075, 0.12, 0.15])
def test_snapshots_give_the_average_that_was_not_tracked(width):
    kept = []
    tracked = direct = None
    for step, module in walk(1000):
        tracked = tracked or [PowerEMA(module, w) for w in (0.05, 0.1)]
        direct = direct or PowerEMA(module, width)
        for ema in (*tracked, direct):
            ema.begin_step(step)
            ema.update(module)
        if step % 50 == 0:
            kept += [(ema.gamma, step, ema.weights["weight"].clone()) for ema in tracked]
    coefficients, missed = posthoc_coefficients([k[:2] for k in kept], gamma_of(width), 1000)
    made = sum(c * tensor for c, (_, _, tensor) in zip(coefficients, kept, strict=True))
    exact, newest = direct.weights["weight"], kept[-1][2]
    error = (made - exact).norm() / (newest - exact).norm()
    assert error < 0.02, f"{error:.3g} of the distance to the newest snapshot"
    assert missed < 0.02


def test_a_profile_that_was_tracked_comes_out_alone():
    kept = [(gamma_of(w), step) for step in (100, 200, 300) for w in (0.05, 0.1)]
    coefficients, missed = posthoc_coefficients(kept, gamma_of(0.1), 200)
    assert coefficients == pytest.approx([0, 0, 0, 1, 0, 0], abs=1e-6)
    assert missed < 1e-6
    _, missed = posthoc_coefficients(kept[:1], gamma_of(0.1), 300)
    assert missed > 0.5


@pytest.mark.parametrize("width", [0.0, -0.1, 0.3, float("nan")])
def test_a_width_that_no_profile_has(width):
    with pytest.raises(ValueError, match=r"must be above 0 and at most 0\.2887, not"):
        gamma_of(width)
