import dataclasses
import math

import pytest
import torch
from util import GaussianDenoiser, small_net

from fastmask.diffusion import EDM, Sampling, draw_batch, draw_samples, sample
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
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \(2,\), not "):
        sample(small_net(), torch.randn(2, 3, 8, 8), torch.tensor(labels), EDM().times(3))


@pytest.mark.parametrize("label", [-1, 6])
def test_labels_outside_the_classes(label):
    with pytest.raises(ValueError, match=f"label {label} is outside 0 .. 4 "):
        sample(small_net(), torch.randn(2, 3, 8, 8), torch.tensor([0, label]), EDM().times(3))


def test_samples_do_not_depend_on_the_batches_they_are_drawn_in():
    net, labels = small_net().double(), torch.tensor([0, 4, 5, 1, 2])
    few = Sampling(sample_steps=4)
    whole = draw_samples(net, labels, few, seed=3)
    assert whole.dtype == torch.float32
    assert whole.shape == (5, 3, 8, 8)
    # In float64 the batch size changes rounding far below a unit of fp32.
    assert_near(draw_samples(net, labels, few, seed=3, batch=2), whole)
    assert_near(draw_samples(net, labels[:2], few, seed=3), whole[:2])
    other = draw_samples(net, labels, few, seed=4)
    assert all(relative_error(a, b) > 0.1 for a, b in zip(other, whole, strict=True))


def test_samples_of_one_label_differ():
    samples = draw_samples(small_net(), torch.tensor([1, 1, 1]), Sampling(sample_steps=3), seed=0)
    assert all(relative_error(samples[a], samples[b]) > 0.1 for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("times", [[0.5, 1.0, 0.0], [0.5, 0.2], [0.0], [[1.0, 0.0]]])
def test_times_that_do_not_fall_to_zero(times):
    with pytest.raises(ValueError, match="times must fall to 0"):
        sample(small_net(), torch.randn(1, 3, 8, 8), torch.tensor([0]), torch.tensor(times))


def test_what_cannot_be_drawn():
    noise, label, times = torch.randn(1, 3, 8, 8), torch.tensor([0]), EDM().times(3)
    with pytest.raises(ValueError, match="cfg_scale must be a number, not nan"):
        sample(small_net(), noise, label, times, cfg_scale=float("nan"))
    for labels, batch in (([], 4), ([0], 0)):
        with pytest.raises(ValueError, match="at least one sample and a batch of at least 1"):
            draw_samples(small_net(), torch.tensor(labels, dtype=torch.int64), Sampling(), seed=0, batch=batch)


def test_defaults_are_one_for_all():
    assert dataclasses.astuple(Sampling()) == ("heun", 40, 1.5, (), "label", 0.0)
    Sampling().check()
    Sampling(solver="dpmpp-2m", guidance_interval=(0.28, math.inf), cfg_scale=0).check()
    assert Sampling().interval == (0, math.inf)
    assert Sampling(guidance="path-drop").unguided() == Sampling(cfg_scale=1)
    assert Sampling(churn=4.0, guidance_interval=(1.0, 2.0)).unguided() == Sampling(churn=4.0, cfg_scale=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"solver": "rk4"}, "--solver must be one of heun, euler, dpmpp-2m, not 'rk4'"),
        ({"sample_steps": 1}, "--sample-steps must be at least 2, not 1"),
        ({"cfg_scale": math.nan}, "--cfg-scale must be a number of at least 0, not nan"),
        ({"cfg_scale": math.inf}, "--cfg-scale must be a number of at least 0, not inf"),
        ({"cfg_scale": -1.0}, "--cfg-scale must be a number of at least 0, not -1"),
        ({"churn": -1.0}, "--churn must be a number of at least 0, not -1"),
        ({"churn": math.nan}, "--churn must be a number of at least 0, not nan"),
        ({"churn": 1.0, "solver": "euler"}, "--churn belongs to solver heun, not euler"),
        ({"guidance_interval": (1.0,)}, "--guidance-interval must be two noise levels, 0 or more, that rise, not 1"),
        ({"guidance_interval": (2.0, 1.0)}, "that rise, not 2 1"),
        ({"guidance_interval": (-1.0, 1.0)}, "that rise, not -1 1"),
        ({"guidance_interval": (0.0, math.nan)}, "that rise, not 0 nan"),
        ({"guidance_interval": (0.1, 1.0), "cfg_scale": 1}, "--guidance-interval limits guidance, which --cfg-scale 1"),
        ({"guidance": "path"}, "--guidance must be label or path-drop, not 'path'"),
        ({"guidance": "path-drop", "cfg_scale": 1}, "--guidance path-drop is guidance, which --cfg-scale 1 disables"),
        ({"guidance": "path-drop"}, "network maskdit has no path to drop, as network sprint has"),
    ],
    ids=str,
)
def test_fields_out_of_range(fields, message):
    if "has no path" not in message:  # which the network says
        with pytest.raises(ValueError, match=message):
            Sampling(**fields).check()
    with pytest.raises(ValueError, match=message):
        draw_samples(small_net(), torch.tensor([0]), Sampling(**fields), seed=0)


def test_a_callback_sees_every_evaluation():
    seen, net, noise = [], GaussianDenoiser(), torch.randn(2, 1, 2, 2)
    times, labels = EDM().times(3), torch.zeros(2, dtype=torch.int64)
    seen_by_it = sample(net, noise, labels, times, callback=lambda t, x, denoised: seen.append((float(t), x, denoised)))
    assert torch.equal(seen_by_it, sample(net, noise, labels, times))
    assert [t for t, _, _ in seen] == [times[i] for i in (0, 1, 1, 2, 2)]
    assert torch.equal(seen[0][1], 80 * noise.double())
    for t, x, denoised in seen:
        assert torch.equal(denoised, net(x.float(), torch.full((2,), t), labels))


def test_a_sample_has_the_same_bits_in_every_batch_of_one_size():
    net, labels, few = small_net(), torch.tensor([0, 4, 5, 1]), Sampling(sample_steps=3)
    alone = draw_batch(net, labels[:2], few, seed=1, first=6)
    assert torch.equal(draw_batch(net, torch.tensor([0, 2]), few, seed=1, first=6)[0], alone[0])
    assert not torch.equal(draw_batch(net, labels[:2], few, seed=1, first=4), alone)
