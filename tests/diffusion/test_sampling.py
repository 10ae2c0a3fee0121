import pytest
import torch
from util import GaussianDenoiser, small_net

from fastmask.diffusion import EDM, draw_samples, sample
from fastmask.testing import assert_near, network_steps, relative_error


def test_state_is_float64_and_the_network_keeps_its_precision():
    noise, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 4])
    # The last step, to zero, must round too, as it does not from a level of 1, or from one close to 0.
    times = EDM().times(4, sigma_min=0.7)
    single = sample(small_net(), noise, labels, times)
    double = sample(small_net().double(), noise, labels, times)
    assert single.dtype == double.dtype == torch.float64
    assert not single.requires_grad
    # A state in fp32 would be a number of fp32.
    assert not torch.equal(single, single.float().double())
    assert not torch.equal(single, double)
    assert_near(single, double, 7 * network_steps(4), dtype=torch.float32)  # seven evaluations one after the other


def test_noise_is_not_written():
    noise = torch.randn(1, 1, 2, 2).double()
    before = noise.clone()
    sample(GaussianDenoiser(), noise, torch.tensor([0]), EDM().times(3))
    assert torch.equal(noise, before)


@pytest.mark.parametrize("labels", [[0], [0, 0, 0], [[0], [0]]])
def test_labels_of_another_shape(labels):
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\) for this noise, not "):
        sample(GaussianDenoiser(), torch.randn(2, 1, 2, 2), torch.tensor(labels), EDM().times(3))


@pytest.mark.parametrize("label", [-1, 6])
def test_labels_outside_the_classes(label):
    with pytest.raises(ValueError, match=f"label {label} is outside 0 .. 4 "):
        sample(small_net(), torch.randn(2, 3, 8, 8), torch.tensor([0, label]), EDM().times(3))


def test_samples_do_not_depend_on_the_batches_they_are_drawn_in():
    net, labels = small_net().double(), torch.tensor([0, 4, 5, 1, 2])
    whole = draw_samples(net, labels, seed=3, num_steps=4, cfg_scale=1.5)
    assert whole.dtype == torch.float32
    assert whole.shape == (5, 3, 8, 8)
    # In float64 the batch size changes rounding far below a unit of fp32.
    assert_near(draw_samples(net, labels, seed=3, num_steps=4, cfg_scale=1.5, batch=2), whole)
    assert_near(draw_samples(net, labels[:2], seed=3, num_steps=4, cfg_scale=1.5), whole[:2])
    other = draw_samples(net, labels, seed=4, num_steps=4, cfg_scale=1.5)
    assert all(relative_error(a, b) > 0.1 for a, b in zip(other, whole, strict=True))


def test_samples_of_one_label_differ():
    samples = draw_samples(small_net(), torch.tensor([1, 1, 1]), seed=0, num_steps=3)
    assert all(relative_error(samples[a], samples[b]) > 0.1 for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("times", [[0.5, 1.0, 0.0], [0.5, 0.2], [0.0], [[1.0, 0.0]]])
def test_times_that_do_not_fall_to_zero(times):
    with pytest.raises(ValueError, match="times must fall to 0"):
        sample(small_net(), torch.randn(1, 3, 8, 8), torch.tensor([0]), torch.tensor(times))


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="cfg_scale must be a number, not nan"):
        draw_samples(small_net(), torch.tensor([0]), seed=0, cfg_scale=float("nan"))
    for labels, batch in (([], 4), ([0], 0)):
        with pytest.raises(ValueError, match="at least one label and a batch of at least 1"):
            draw_samples(small_net(), torch.tensor(labels, dtype=torch.int64), seed=0, batch=batch)
