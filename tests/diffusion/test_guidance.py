import pytest
import torch
from util import GaussianDenoiser, small_net

from fastmask.diffusion import EDM, Denoiser, RectifiedFlow, sample
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
    message = r"guidance needs a network with classes \(num_classes above 0\), or another model as a guide"
    with pytest.raises(ValueError, match=message):
        sample(small_net(num_classes=0), torch.randn(1, 3, 8, 8), torch.tensor([0]), EDM().times(3), cfg_scale=1.5)
    with pytest.raises(ValueError, match=message):
        sample(GaussianDenoiser(), torch.randn(1, 1, 2, 2), torch.tensor([0]), EDM().times(3), cfg_scale=1.5)


def test_guidance_in_an_interval_of_noise_levels():
    """Outside one evaluation with the label; inside, (low, high], two."""
    net = GaussianDenoiser(mean=(1.0, -2.0, 0.25), num_classes=2)
    noise, labels, times = torch.randn(2, 1, 2, 2), torch.tensor([0, 1]), EDM().times(6)
    low, high = float(times[4]), float(times[2])
    sample(net, noise, labels, times, cfg_scale=1.5, interval=(low, high), solver="euler")
    assert [len(asked) for _, _, asked in net.asked] == [2, 2, 4, 4, 2, 2]
    without = sample(net, noise, labels, times, solver="euler")
    never = sample(net, noise, labels, times, cfg_scale=1.5, interval=(100, 200), solver="euler")
    assert torch.equal(never, without)
    always = sample(net, noise, labels, times, cfg_scale=1.5, solver="euler")
    some = sample(net, noise, labels, times, cfg_scale=1.5, interval=(low, high), solver="euler")
    assert not torch.equal(some, without)
    assert not torch.equal(some, always)


def test_an_interval_of_a_flow_is_of_levels_not_times():
    process = RectifiedFlow()
    net = GaussianDenoiser(mean=(1.0, -2.0, 0.25), num_classes=2, process=process)
    times = process.times(4)  # levels: infinite, 3, 1 and a third
    for interval, guided in (((0.5, 3), [1, 2, 2, 1]), ((1, torch.inf), [2, 2, 1, 1])):
        net.asked.clear()
        noise = torch.randn(1, 1, 2, 2)
        sample(net, noise, torch.tensor([0]), times, cfg_scale=1.5, interval=interval, solver="euler")
        assert [len(asked) for _, _, asked in net.asked] == guided


@pytest.mark.parametrize("num_classes", [2, 0])
def test_another_model_guides_with_the_same_label(num_classes):
    """From its mean to the network's, and beyond: for data of one width a Gaussian around a mean of its own."""
    strong = GaussianDenoiser(mean=(1.0, -2.0, 0.25), num_classes=num_classes)
    weak = GaussianDenoiser(mean=(0.5, -1.0, 9.0), num_classes=num_classes)
    noise, labels, times = torch.randn(2, 1, 2, 2), torch.tensor([0, 1]), EDM().times(6)
    for net in (strong, weak):
        net.model.in_channels, net.model.input_size = 1, 2
    drawn = sample(strong, noise, labels, times, cfg_scale=3.0, guide=weak)
    moved = GaussianDenoiser(mean=(0.5 + 3 * 0.5, -1.0 - 3 * 1.0))
    assert_near(drawn, sample(moved, noise, labels, times), dtype=torch.float32)
    assert all(asked.tolist() == [0, 1] for _, _, asked in [*strong.asked, *weak.asked])
    assert len(weak.asked) == 11
    weak.asked.clear()
    sample(strong, noise, labels, times, cfg_scale=3.0, interval=(1.0, 10.0), guide=weak)
    assert 0 < len(weak.asked) == sum(1.0 < float(t[0]) <= 10.0 for _, t, _ in strong.asked[-11:]) < 11


def test_guides_that_do_not_fit():
    net, flow = small_net(), Denoiser(small_net().model, RectifiedFlow())
    arguments = torch.randn(1, 3, 8, 8), torch.tensor([0]), EDM().times(3)
    for guide, message in [
        (small_net(in_channels=4), r"the guide draws images of shape \(4, 8, 8\), and the network of \(3, 8, 8\)"),
        (small_net(num_classes=4), "the guide knows 4 classes, and the network 5"),
        (flow, "the guide is of process flow, and the network of edm"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample(net, *arguments, cfg_scale=2.0, guide=guide)
    sample(net, *arguments, cfg_scale=2.0, guide=small_net(num_classes=0))  # which knows no labels
