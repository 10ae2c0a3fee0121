import math
from itertools import pairwise

import pytest
import torch
from util import SMALL_SIZES, small_net

from fastmask import EDMPrecond, MaskDiT
from fastmask.diffusion import EDMLoss, LossParts, TrainingObjective, draw_samples, edm_sample
from fastmask.kernels import sample_mask, unpatchify
from fastmask.testing import assert_near, assert_network_accurate, network_steps, relative_error

LENGTH = 16  # positions of small_net


def batch_of(net, batch=3, dtype=torch.float32):
    """Images, labels (the last of them none), sigma and noise."""
    model = net.model
    images = torch.randn(batch, model.in_channels, model.input_size, model.input_size) * 0.5
    sigma = torch.linspace(0.1, 3.0, batch)
    noise = torch.randn_like(images) * sigma[:, None, None, None]
    labels = torch.arange(batch)
    labels[-1] = model.num_classes
    return images.to(dtype), labels, sigma.to(dtype), noise.to(dtype)


# The denoiser


@pytest.mark.parametrize("sigma_data", [0.5, 1.7])
def test_preconditioning_by_the_paper(sigma_data):
    net = small_net(sigma_data=sigma_data).double()
    images, labels, sigma, noise = batch_of(net, dtype=torch.float64)
    x = images + noise
    exact = torch.empty_like(x)
    for b, s in enumerate(sigma.tolist()):
        root = math.sqrt(s**2 + sigma_data**2)
        part = slice(b, b + 1)
        raw = net.model(x[part] / root, torch.tensor([math.log(s) / 4], dtype=torch.float64), labels[part])
        exact[b] = sigma_data**2 / root**2 * x[b] + s * sigma_data / root * unpatchify(raw, 2, 8, 8)[0]
    # c_noise passes through the time embedding's fp32 frequencies, here as there.
    assert_near(net(x, sigma, labels), exact, network_steps(4))


def test_without_noise_the_input_is_the_answer():
    net = small_net()
    images, labels, _, _ = batch_of(net)
    for sigma in (1e-3, 1e-6):
        difference = net(images, torch.full((3,), sigma), labels) - images
        raw = unpatchify(net.raw_tokens(images, torch.full((3,), sigma), labels), 2, 8, 8)
        # D - x = -sigma^2 / (sigma^2 + sd^2) x + c_out F, and c_out < sigma.
        assert (difference.abs() <= sigma * raw.abs() + 4 * sigma**2 * images.abs() + 3e-7).all()


def test_under_all_noise_the_network_alone_answers():
    net = small_net()
    x = torch.randn(3, 3, 8, 8) * 1e4
    sigma = torch.full((3,), 1e4)
    raw = unpatchify(net.raw_tokens(x, sigma, torch.arange(3)), 2, 8, 8)
    # c_skip x = 2.5e-9 x, and c_out = sd up to 1e-9.
    torch.testing.assert_close(net(x, sigma, torch.arange(3)), 0.5 * raw, rtol=1e-6, atol=2e-4)


def test_a_fresh_denoiser_returns_the_skipped_input():
    net = EDMPrecond(MaskDiT(**SMALL_SIZES))
    x = torch.randn(2, 3, 8, 8)
    denoised = net(x, torch.tensor([0.5, 0.5]), torch.tensor([0, 5]))
    assert torch.equal(denoised, x / 2)


def test_denoised_images_keep_the_dtype_of_the_input():
    net = small_net()
    images, labels, sigma, noise = batch_of(net)
    exact = net(images + noise, sigma, labels)
    out = net.to(torch.bfloat16)((images + noise).bfloat16(), sigma, labels)
    assert out.dtype == torch.bfloat16
    assert_near(out, exact, network_steps(4))


@pytest.mark.parametrize("label", [-1, 6])
def test_a_label_outside_the_classes(label):
    net = small_net()
    images, labels, sigma, _ = batch_of(net)
    labels[1] = label
    with pytest.raises(ValueError, match=rf"label {label} is outside 0 .. 4 \(or 5 for no label\)"):
        net(images, sigma, labels)


def test_any_label_for_an_unconditional_network():
    net = small_net(num_classes=0)
    images, labels, sigma, _ = batch_of(net)
    assert torch.equal(net(images, sigma, labels - 3), net(images, sigma, labels))


# The loss


@pytest.mark.parametrize("mae_coef", [0.1, 0.0, 2.0])
def test_total_is_the_weighted_sum(mae_coef):
    net = small_net()
    images, labels, sigma, noise = batch_of(net)
    mask = sample_mask(3, LENGTH, 5, seed=0, device="cpu")
    parts = EDMLoss(mae_coef=mae_coef)(net, images, labels, mask=mask, sigma=sigma, noise=noise)
    assert torch.equal(parts.total, parts.denoising + mae_coef * parts.reconstruction)
    assert (parts.reconstruction > 0).all()


def test_dense_loss_is_the_weighted_error_of_the_denoiser():
    net = small_net().double()
    images, labels, sigma, noise = batch_of(net, dtype=torch.float64)
    parts = EDMLoss()(net, images, labels, sigma=sigma[:, None, None, None], noise=noise)
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    exact = weight * (net(images + noise, sigma, labels) - images).square().mean((1, 2, 3))
    assert_near(parts.total, exact, 5)
    assert not parts.reconstruction.any()


def test_a_mask_that_keeps_all_is_dense_bit_for_bit():
    net = small_net()
    images, labels, sigma, noise = batch_of(net)
    mask = sample_mask(3, LENGTH, LENGTH, seed=0, device="cpu")
    assert torch.equal(net(images + noise, sigma, labels, mask), net(images + noise, sigma, labels))
    gradients = []
    for given in (None, mask):
        net.zero_grad()
        parts = EDMLoss()(net, images, labels, mask=given, sigma=sigma, noise=noise)
        parts.total.mean().backward()
        gradients.append((parts, {name: parameter.grad for name, parameter in net.named_parameters()}))
    (dense_parts, dense), (masked_parts, masked) = gradients
    assert all(torch.equal(a, b) for a, b in zip(masked_parts, dense_parts, strict=True))
    # The mask token is not used: no gradient in one case, a gradient of zeros in the other.
    assert dense.pop("model.mask_token") is None
    assert torch.equal(masked.pop("model.mask_token"), torch.zeros(1, 1, 12))
    for name, grad in dense.items():
        assert torch.equal(masked[name], grad), name
        assert grad.any(), name


def test_every_weight_learns_from_a_masked_batch():
    net = small_net()
    images, labels, sigma, noise = batch_of(net)
    mask = sample_mask(3, LENGTH, 5, seed=0, device="cpu")
    EDMLoss()(net, images, labels, mask=mask, sigma=sigma, noise=noise).total.mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.any(), name


def test_autocast_losses_are_fp32_and_near():
    net = small_net()
    images, labels, sigma, noise = batch_of(net)
    mask = sample_mask(3, LENGTH, 5, seed=0, device="cpu")
    exact = EDMLoss()(net, images, labels, mask=mask, sigma=sigma, noise=noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = EDMLoss()(net, images, labels, mask=mask, sigma=sigma, noise=noise)
    for name, part, expected in zip(LossParts._fields, parts, exact, strict=True):
        assert part.dtype == torch.float32, name
        assert_near(part, expected, network_steps(4), dtype=torch.bfloat16, name=name)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, math.nan])
def test_a_ratio_outside_the_range(ratio):
    with pytest.raises(ValueError, match="mask_ratio must be at least 0 and below 1, not "):
        EDMLoss(mask_ratio=ratio)


@pytest.mark.parametrize("keep", [None, 6])
def test_objective_compiles_without_a_graph_break(keep):
    objective = TrainingObjective(small_net(), EDMLoss())
    images, labels, sigma, noise = batch_of(objective.net)
    mask = None if keep is None else sample_mask(3, LENGTH, keep, seed=0, device="cpu")
    expected = objective(images, labels, mask, sigma, noise)
    expected.total.mean().backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in objective.named_parameters() if keep or "mask" not in name
    }
    objective.zero_grad()
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    parts = compiled(images, labels, mask, sigma, noise)
    parts.total.mean().backward()
    for name, part, same in zip(LossParts._fields, parts, expected, strict=True):
        assert_near(part, same, network_steps(4), name=name)
    compiled_gradients = {name: objective.get_parameter(name).grad for name in gradients}
    assert_network_accurate(compiled_gradients, gradients, network_steps(4, backward=True))


# The sampler


class GaussianDenoiser:
    """The exact denoiser of N(mean[label], deviation^2) data; keeps what it was asked."""

    def __init__(self, deviation=0.5, mean=(0.0, 0.0)):
        self.variance, self.mean = deviation**2, torch.tensor(mean)
        self.asked = []

    def __call__(self, x, sigma, labels):
        self.asked.append((x.dtype, sigma, labels))
        weight = (self.variance / (self.variance + sigma.double().square()))[:, None, None, None]
        mean = self.mean[labels][:, None, None, None]
        return mean + weight * (x.double() - mean)


def test_sampler_approaches_the_exact_solution_at_second_order():
    latents, labels = torch.randn(2, 1, 4, 4).double(), torch.zeros(2, dtype=torch.int64)
    # dx/dsigma = x sigma / (sigma^2 + s^2), from sigma_max to 0.
    exact = latents * 80 * 0.5 / math.sqrt(0.5**2 + 80**2)
    errors = [relative_error(edm_sample(GaussianDenoiser(), latents, labels, n), exact) for n in (21, 41, 81)]
    assert errors[2] < 3e-3
    for coarse, fine in pairwise(errors):
        assert 3.5 < coarse / fine < 4.5


def test_levels_and_number_of_evaluations():
    net = GaussianDenoiser()
    edm_sample(net, torch.randn(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64), 5, sigma_min=0.01, sigma_max=20, rho=3)
    levels = [(20 ** (1 / 3) + i / 4 * (0.01 ** (1 / 3) - 20 ** (1 / 3))) ** 3 for i in range(5)]
    asked = [level for level in levels for _ in range(2)][1:]  # Heun looks at each level twice, at the first once
    assert len(net.asked) == 9
    for (dtype, sigma, _), level in zip(net.asked, asked, strict=True):
        assert dtype == torch.float32
        assert sigma.tolist() == pytest.approx([level] * 3, rel=1e-6)


@pytest.mark.parametrize("num_steps", [2, 3, 18, 40])
def test_number_of_evaluations(num_steps):
    net = GaussianDenoiser()
    edm_sample(net, torch.randn(1, 1, 2, 2), torch.tensor([0]), num_steps)
    assert len(net.asked) == 2 * num_steps - 1


def test_guidance_is_a_combination_of_two_denoisers():
    # None, guided by scale s towards a label: for data of one width that is a Gaussian around a scaled mean.
    latents, labels = torch.randn(3, 1, 2, 2), torch.tensor([0, 1, 0])
    net = GaussianDenoiser(mean=(1.0, -2.0, 0.25))
    guided = edm_sample(net, latents, labels, 8, 1.5, num_classes=2)
    moved = GaussianDenoiser(mean=(0.25 + 1.5 * 0.75, 0.25 - 1.5 * 2.25))
    # The labels' levels are fp32, all else is float64.
    assert_near(guided, edm_sample(moved, latents, labels, 8), dtype=torch.float32)
    assert len(net.asked) == 15
    assert all(asked.tolist() == [0, 1, 0, 2, 2, 2] for _, _, asked in net.asked)


def test_guidance_of_scale_one_is_none():
    net = small_net()
    latents, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 4])
    without = edm_sample(net, latents, labels, 4)
    assert torch.equal(edm_sample(net, latents, labels, 4, 1.0), without)
    assert torch.equal(edm_sample(net, latents, labels, 4, 1), without)
    assert not torch.equal(edm_sample(net, latents, labels, 4, 1.5), without)
    recorded = GaussianDenoiser()
    edm_sample(recorded, latents, torch.tensor([0, 1]), 4, 1.0)
    assert all(len(asked) == 2 for _, _, asked in recorded.asked)


def test_guidance_of_an_unlabelled_sample_changes_rounding_only():
    net = small_net()
    latents, none = torch.randn(2, 3, 8, 8), torch.tensor([5, 5])
    # Seven evaluations one after the other.
    unguided = edm_sample(net, latents, none, 4)
    assert_near(edm_sample(net, latents, none, 4, 3.0), unguided, 7 * network_steps(4), dtype=torch.float32)


def test_state_is_float64_and_the_network_keeps_its_precision():
    latents, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 4])
    # The last step, to zero, must round too, as it does not from a level of 1, or from one close to 0.
    single = edm_sample(small_net(), latents, labels, 4, sigma_min=0.7)
    double = edm_sample(small_net().double(), latents, labels, 4, sigma_min=0.7)
    assert single.dtype == double.dtype == torch.float64
    assert not single.requires_grad
    # A state in fp32 would be a number of fp32.
    assert not torch.equal(single, single.float().double())
    assert not torch.equal(single, double)
    assert_near(single, double, 7 * network_steps(4), dtype=torch.float32)  # seven evaluations one after the other


def test_latents_are_not_written():
    latents = torch.randn(1, 1, 2, 2).double()
    before = latents.clone()
    edm_sample(GaussianDenoiser(), latents, torch.tensor([0]), 3)
    assert torch.equal(latents, before)


@pytest.mark.parametrize("num_steps", [1, 0, -3])
def test_too_few_steps(num_steps):
    with pytest.raises(ValueError, match=f"num_steps must be at least 2, not {num_steps}"):
        edm_sample(GaussianDenoiser(), torch.randn(1, 1, 2, 2), torch.tensor([0]), num_steps)


@pytest.mark.parametrize("labels", [[0], [0, 0, 0], [[0], [0]]])
def test_labels_of_another_shape(labels):
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\) for these latents, not "):
        edm_sample(GaussianDenoiser(), torch.randn(2, 1, 2, 2), torch.tensor(labels), 3)


@pytest.mark.parametrize("label", [-1, 6])
def test_labels_outside_the_classes(label):
    with pytest.raises(ValueError, match=f"label {label} is outside 0 .. 4 "):
        edm_sample(small_net(), torch.randn(2, 3, 8, 8), torch.tensor([0, label]), 3)


def test_guidance_needs_classes():
    message = r"guidance needs a network with classes \(num_classes above 0\)"
    with pytest.raises(ValueError, match=message):
        edm_sample(small_net(num_classes=0), torch.randn(1, 3, 8, 8), torch.tensor([0]), 3, 1.5)
    with pytest.raises(ValueError, match=message):
        edm_sample(GaussianDenoiser(), torch.randn(1, 1, 2, 2), torch.tensor([0]), 3, 1.5)


def test_samples_do_not_depend_on_the_parts_they_are_drawn_in():
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
