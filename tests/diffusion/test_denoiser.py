import math

import pytest
import torch
from util import SMALL_SIZES, batch_of, small_net

from fastmask import EDMPrecond, MaskDiT
from fastmask.diffusion import EDM, Denoiser
from fastmask.kernels import unpatchify
from fastmask.testing import assert_near, network_steps


def test_edms_denoiser_by_its_known_name():
    net = EDMPrecond(MaskDiT(**SMALL_SIZES), sigma_data=1.7)
    assert isinstance(net, Denoiser)
    assert net.process == EDM(sigma_data=1.7)
    assert EDMPrecond(net.model).process == EDM()


@pytest.mark.parametrize("sigma_data", [0.5, 1.7])
def test_preconditioning_by_the_paper(sigma_data):
    net = small_net(sigma_data=sigma_data).double()
    images, labels, t, noise = batch_of(net, dtype=torch.float64)
    x = net.process.noised(images, noise, t)
    exact = torch.empty_like(x)
    for b, s in enumerate(t.tolist()):
        root = math.sqrt(s**2 + sigma_data**2)
        part = slice(b, b + 1)
        raw = net.model(x[part] / root, torch.tensor([math.log(s) / 4], dtype=torch.float64), labels[part])
        exact[b] = sigma_data**2 / root**2 * x[b] + s * sigma_data / root * unpatchify(raw, 2, 8, 8)[0]
    # c_noise passes through the time embedding's fp32 frequencies, here as there.
    assert_near(net(x, t, labels), exact, network_steps(4))


def test_without_noise_the_input_is_the_answer():
    net = small_net()
    images, labels, _, _ = batch_of(net)
    for sigma in (1e-3, 1e-6):
        t = torch.full((3,), sigma)
        difference = net(images, t, labels) - images
        raw = unpatchify(net.raw_tokens(images, net.process.coefficients(t), labels), 2, 8, 8)
        # D - x = -sigma^2 / (sigma^2 + sd^2) x + c_out F, and c_out < sigma.
        assert (difference.abs() <= sigma * raw.abs() + 4 * sigma**2 * images.abs() + 3e-7).all()


def test_under_all_noise_the_network_alone_answers():
    net = small_net()
    x = torch.randn(3, 3, 8, 8) * 1e4
    t = torch.full((3,), 1e4)
    raw = unpatchify(net.raw_tokens(x, net.process.coefficients(t), torch.arange(3)), 2, 8, 8)
    # c_skip x = 2.5e-9 x, and c_out = sd up to 1e-9.
    torch.testing.assert_close(net(x, t, torch.arange(3)), 0.5 * raw, rtol=1e-6, atol=2e-4)


def test_a_fresh_denoiser_returns_the_skipped_input():
    net = EDMPrecond(MaskDiT(**SMALL_SIZES))
    x = torch.randn(2, 3, 8, 8)
    denoised = net(x, torch.tensor([0.5, 0.5]), torch.tensor([0, 5]))
    assert torch.equal(denoised, x / 2)


def test_denoised_images_keep_the_dtype_of_the_input():
    net = small_net()
    images, labels, t, noise = batch_of(net)
    x = net.process.noised(images, noise, t)
    exact = net(x, t, labels)
    out = net.to(torch.bfloat16)(x.bfloat16(), t, labels)
    assert out.dtype == torch.bfloat16
    assert_near(out, exact, network_steps(4))


@pytest.mark.parametrize("label", [-1, 6])
def test_a_label_outside_the_classes(label):
    net = small_net()
    images, labels, t, _ = batch_of(net)
    labels[1] = label
    with pytest.raises(ValueError, match=rf"label {label} is outside 0 .. 4 \(or 5 for no label\)"):
        net(images, t, labels)


def test_any_label_for_an_unconditional_network():
    net = small_net(num_classes=0)
    images, labels, t, _ = batch_of(net)
    assert torch.equal(net(images, t, labels - 3), net(images, t, labels))
