import pytest
import torch
from util import GaussianDenoiser, small_net

from fastmask.diffusion import EDM, sample
from fastmask.testing import assert_near, network_steps


def test_guidance_is_a_combination_of_two_denoisers():
    # None, guided by scale s towards a label: for data of one width that is a Gaussian around a scaled mean.
    noise, labels, times = torch.randn(3, 1, 2, 2), torch.tensor([0, 1, 0]), EDM().times(8)
    net = GaussianDenoiser(mean=(1.0, -2.0, 0.25), num_classes=2)
    guided = sample(net, noise, labels, times, cfg_scale=1.5)
    moved = GaussianDenoiser(mean=(0.25 + 1.5 * 0.75, 0.25 - 1.5 * 2.25))
    # The labels' times are fp32, all else is float64.
    assert_near(guided, sample(moved, noise, labels, times), dtype=torch.float32)
    assert len(net.asked) == 15
    assert all(asked.tolist() == [0, 1, 0, 2, 2, 2] for _, _, asked in net.asked)


def test_guidance_of_scale_one_is_none():
    net, noise, labels, times = small_net(), torch.randn(2, 3, 8, 8), torch.tensor([0, 4]), EDM().times(4)
    without = sample(net, noise, labels, times)
    assert torch.equal(sample(net, noise, labels, times, cfg_scale=1.0), without)
    assert torch.equal(sample(net, noise, labels, times, cfg_scale=1), without)
    assert not torch.equal(sample(net, noise, labels, times, cfg_scale=1.5), without)
    recorded = GaussianDenoiser(num_classes=2)
    sample(recorded, noise, torch.tensor([0, 1]), times, cfg_scale=1.0)
    assert all(len(asked) == 2 for _, _, asked in recorded.asked)


def test_guidance_of_an_unlabelled_sample_changes_rounding_only():
    net, noise, none, times = small_net(), torch.randn(2, 3, 8, 8), torch.tensor([5, 5]), EDM().times(4)
    # Seven evaluations one after the other.
    unguided = sample(net, noise, none, times)
    guided = sample(net, noise, none, times, cfg_scale=3.0)
    assert_near(guided, unguided, 7 * network_steps(4), dtype=torch.float32)


def test_guidance_needs_classes():
    message = r"guidance needs a network with classes \(num_classes above 0\)"
    with pytest.raises(ValueError, match=message):
        sample(small_net(num_classes=0), torch.randn(1, 3, 8, 8), torch.tensor([0]), EDM().times(3), cfg_scale=1.5)
    with pytest.raises(ValueError, match=message):
        sample(GaussianDenoiser(), torch.randn(1, 1, 2, 2), torch.tensor([0]), EDM().times(3), cfg_scale=1.5)
