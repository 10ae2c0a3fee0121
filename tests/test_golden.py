"""Equality with the published implementation, from its recorded inputs and outputs."""

import os

import pytest
import torch
from util import golden

from fastmask import Mask, load_maskdit
from fastmask.diffusion import MaskedDenoising, Objective, sample
from fastmask.kernels import backends
from fastmask.testing import assert_near, network_steps

# Of a network of 3 + 8 blocks, forward and backward; the published numbers are fp32 too, so that both err.
FORWARD, BACKWARD = 2 * network_steps(11), 2 * network_steps(11, backward=True)
# The losses' names, and those of the published ones.
LOSSES = {"loss": "total_loss", "denoising": "denoising_loss", "reconstruction": "reconstruction_loss"}

needs_every_kernel = pytest.mark.skipif(
    any(row.device == "cpu" and row.kernel == "none" for row in backends()),
    reason="the fused form has no kernels here: the native ones are not built",
)


@pytest.fixture(scope="module")
def net():
    return load_maskdit(golden().weights, num_heads=golden().info["config"]["num_heads"])


@pytest.fixture(scope="module")
def mask():
    return Mask(golden().arrays["ids_keep"], golden().arrays["ids_restore"])


@pytest.fixture(scope="module")
def labels():
    labels = golden().arrays["labels"].clone()
    labels[golden().info["dropped_label_samples"]] = golden().info["config"]["num_classes"]
    return labels


@pytest.fixture(scope="module")
def noised():
    return golden().arrays["images"] + golden().arrays["noise"]


@pytest.fixture(scope="module")
def sigma():
    return golden().arrays["sigma"].flatten()


def losses(net, labels, mask):
    images, sigma, noise = (golden().arrays[name] for name in ("images", "sigma", "noise"))
    # The recorded noise is times sigma.
    return Objective(net, [MaskedDenoising(golden().info["mae_coef"])])(
        images, labels, mask, sigma.flatten(), noise / sigma
    )


def check_losses(actual):
    assert actual.keys() == LOSSES.keys()
    for name, published in LOSSES.items():
        assert_near(actual[name], golden().arrays[published], FORWARD, name=name)


def test_mask_is_the_published_one(mask):
    assert torch.equal(mask.dropped, golden().arrays["mask"].bool())


def test_masked_forward(net, noised, sigma, labels, mask):
    assert_near(net(noised, sigma, labels, mask), golden().arrays["masked_denoised"], FORWARD)


def test_full_forward(net, noised, sigma, labels):
    assert_near(net(noised, sigma, labels), golden().arrays["full_denoised"], FORWARD)


def test_eval_forward(net, noised, sigma):
    denoised = net(noised, sigma, golden().arrays["labels"])
    assert_near(denoised, golden().arrays["eval_denoised"], FORWARD)


def test_masked_losses(net, labels, mask):
    check_losses(losses(net, labels, mask))


def test_full_loss(net, labels):
    parts = losses(net, labels, None)
    assert_near(parts["loss"], golden().arrays["full_loss"], FORWARD)
    assert torch.equal(parts["loss"], parts["denoising"])


def test_every_gradient_norm(net, labels, mask):
    check_gradient_norms(net, losses(net, labels, mask)["loss"].mean())


def check_gradient_norms(net, total):
    parameters = dict(net.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(total, parameters.values()), strict=True))
    expected = golden().info["grad_norms"]
    assert gradients.keys() == expected.keys()
    for name, norm in expected.items():
        assert_near(gradients[name].norm(), torch.tensor(norm), BACKWARD, name=name)


@needs_every_kernel
def test_the_fused_form(monkeypatch, net, labels, mask):
    """The native kernels: losses and every gradient. Triton's are interpreted, too slowly for the gradients."""
    monkeypatch.setattr(net.model, "impl", "fused")
    if os.environ.get("TRITON_INTERPRET") == "1":
        with torch.no_grad():
            parts = losses(net, labels, mask)
    else:
        parts = losses(net, labels, mask)
        check_gradient_norms(net, parts["loss"].mean())
    check_losses(parts)


@needs_every_kernel
def test_the_fused_form_unmasked(monkeypatch, net, noised, sigma, labels):
    monkeypatch.setattr(net.model, "impl", "fused")
    with torch.no_grad():
        denoised = net(noised[:1], sigma[:1], labels[:1])
    assert_near(denoised, golden().arrays["full_denoised"][:1], FORWARD)


@pytest.mark.once
@pytest.mark.parametrize(("cfg_scale", "name"), [(None, "sampled"), (1.5, "sampled_cfg")])
def test_samples(net, cfg_scale, name):
    arrays, sampler = golden().arrays, golden().info["sampler"]
    times = net.process.times(**{name: sampler[name] for name in ("num_steps", "sigma_min", "sigma_max", "rho")})
    samples = sample(net, arrays["latents"], arrays["labels"], times, cfg_scale=cfg_scale)
    assert cfg_scale in (None, sampler["cfg_scale"])
    evaluations = 2 * sampler["num_steps"] - 1
    assert_near(samples, arrays[name], evaluations * FORWARD, dtype=torch.float32)


def test_order_of_the_kept_tokens_changes_rounding_only(net, noised, sigma, labels, mask):
    batch, keep = mask.ids_keep.shape
    order = torch.stack([torch.randperm(keep) for _ in range(batch)])
    rank = order.argsort(1)  # rank[old row] = new row
    kept = mask.ids_restore < keep
    shuffled = Mask(
        mask.ids_keep.gather(1, order),
        torch.where(kept, rank.gather(1, mask.ids_restore.clamp(max=keep - 1)), mask.ids_restore),
    )
    assert not torch.equal(shuffled.ids_keep, mask.ids_keep)
    assert torch.equal(shuffled.dropped, mask.dropped)
    # The attention's sums run in another order.
    assert_near(net(noised, sigma, labels, shuffled), net(noised, sigma, labels, mask), FORWARD)
    new, old = losses(net, labels, shuffled), losses(net, labels, mask)
    for name in LOSSES:
        assert_near(new[name], old[name], FORWARD, name=name)
