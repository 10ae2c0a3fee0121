import pytest
import torch
from util import batch_of, small_net

from fastmask.diffusion import EDM, MaskedDenoising, Objective
from fastmask.diffusion.objective import Term
from fastmask.kernels import sample_mask
from fastmask.kernels.patches import patchify
from fastmask.testing import assert_near, assert_network_accurate, network_steps

LENGTH = 16  # positions of small_net


def objective_of(net, mae_coef=0.1):
    return Objective(net, [MaskedDenoising(mae_coef)])


@pytest.mark.parametrize("mae_coef", [0.1, 0.0, 2.0])
def test_loss_is_the_weighted_sum(mae_coef):
    objective = objective_of(small_net(), mae_coef)
    images, labels, t, noise = batch_of(objective.net)
    parts = objective(images, labels, sample_mask(3, LENGTH, 5, seed=0, device="cpu"), t, noise)
    assert tuple(parts) == objective.names == ("loss", "denoising", "reconstruction")
    assert torch.equal(parts["loss"], parts["denoising"] + mae_coef * parts["reconstruction"])
    assert (parts["reconstruction"] > 0).all()


def test_dense_loss_is_the_weighted_error_of_the_denoiser():
    net = small_net().double()
    images, labels, t, noise = batch_of(net, dtype=torch.float64)
    parts = objective_of(net)(images, labels, None, t, noise)
    weight = (t**2 + 0.25) / (t * 0.5) ** 2
    exact = weight * (net(images + t[:, None, None, None] * noise, t, labels) - images).square().mean((1, 2, 3))
    assert_near(parts["loss"], exact, 5)
    assert not parts["reconstruction"].any()


@pytest.mark.parametrize("packed", [False, True])
def test_clean_patches_as_the_target_of_reconstruction(packed):
    net = small_net().double()
    images, labels, t, noise = batch_of(net, dtype=torch.float64)
    keep = torch.tensor([5, 1, 9], dtype=torch.int32) if packed else 5
    mask = sample_mask(3, LENGTH, keep, seed=0, device="cpu", total=15 if packed else None)
    parts = Objective(net, [MaskedDenoising(0.3, "clean")])(images, labels, mask, t, noise)
    noised = net.process.noised(images, noise, t)
    weight = (t**2 + 0.25) / (t * 0.5) ** 2
    squared = weight[:, None] * patchify((net(noised, t, labels, mask) - images).square(), 2).mean(-1)
    for name, chosen in (("denoising", ~mask.dropped), ("reconstruction", mask.dropped)):
        exact = torch.stack([row[of].mean() for row, of in zip(squared, chosen, strict=True)])
        assert_near(parts[name], exact, 5)
    assert torch.equal(parts["loss"], parts["denoising"] + 0.3 * parts["reconstruction"])


@pytest.mark.parametrize("packed", [False, True])
def test_the_fused_loss_of_clean_targets_and_its_gradient(packed):
    net = small_net(width=16, num_heads=2, decoder_width=8, decoder_num_heads=2)
    images, labels, t, noise = batch_of(net)
    keep = torch.tensor([5, 1, 9], dtype=torch.int32) if packed else 5
    mask = sample_mask(3, LENGTH, keep, seed=0, device="cpu", total=15 if packed else None)
    losses, gradients = [], []
    for impl in ("fused", "reference"):
        net.model.impl = impl
        net.zero_grad()
        loss = Objective(net, [MaskedDenoising(0.3, "clean")])(images, labels, mask, t, noise)["loss"]
        loss.sum().backward()
        losses.append(loss.detach())
        gradients.append(net.model.final_layer.linear.weight.grad)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


class Size(Term):
    """A term of one's own, the mean square of the network's output; keeps what it was given."""

    def forward(self, net, seen):
        self.net, self.seen = net, seen
        return {"size": seen.raw.square().mean((1, 2))}


def test_a_term_of_ones_own():
    net = small_net()
    images, labels, t, noise = batch_of(net)
    mask = sample_mask(3, LENGTH, 5, seed=0, device="cpu")
    own = Size({"size": 0.25})
    objective = Objective(net, [MaskedDenoising(2.0), own])
    parts, alone = objective(images, labels, mask, t, noise), objective_of(net, 2.0)(images, labels, mask, t, noise)
    assert tuple(parts) == objective.names == ("loss", "denoising", "reconstruction", "size")
    assert torch.equal(parts["loss"], alone["loss"] + 0.25 * parts["size"])
    assert all(torch.equal(parts[name], alone[name]) for name in ("denoising", "reconstruction"))
    seen, coefficients = own.seen, EDM().coefficients(t)
    assert own.net is net
    assert seen.images is images
    assert seen.mask is mask
    assert torch.equal(seen.noised, images + t[:, None, None, None] * noise)
    assert all(map(torch.equal, seen.coefficients, coefficients))
    assert torch.equal(seen.raw, net.raw_tokens(seen.noised, coefficients, labels, mask))
    listed = objective.mixed([images], labels, [mask], t, [noise])
    assert all(torch.equal(listed[name], parts[name]) for name in objective.names)


@pytest.mark.parametrize(
    "terms", [[], [Size({"size": 1.0}), Size({"size": 2.0})], [Size({"loss": 1.0})]], ids=["none", "twice", "loss"]
)
def test_terms_that_cannot_be_told_apart(terms):
    with pytest.raises(ValueError, match="a sum of terms whose losses have different names, not "):
        Objective(small_net(), terms)


def test_a_mask_that_keeps_all_is_dense_bit_for_bit():
    net = small_net()
    images, labels, t, noise = batch_of(net)
    x = net.process.noised(images, noise, t)
    mask = sample_mask(3, LENGTH, LENGTH, seed=0, device="cpu")
    assert torch.equal(net(x, t, labels, mask), net(x, t, labels))
    gradients = []
    for given in (None, mask):
        net.zero_grad()
        parts = objective_of(net)(images, labels, given, t, noise)
        parts["loss"].mean().backward()
        gradients.append((parts, {name: parameter.grad for name, parameter in net.named_parameters()}))
    (dense_parts, dense), (masked_parts, masked) = gradients
    assert all(torch.equal(part, dense_parts[name]) for name, part in masked_parts.items())
    # The mask token is not used: no gradient in one case, a gradient of zeros in the other.
    assert dense.pop("model.mask_token") is None
    assert torch.equal(masked.pop("model.mask_token"), torch.zeros(1, 1, 12))
    for name, grad in dense.items():
        assert torch.equal(masked[name], grad), name
        assert grad.any(), name


def test_every_weight_learns_from_a_masked_batch():
    net = small_net()
    images, labels, t, noise = batch_of(net)
    mask = sample_mask(3, LENGTH, 5, seed=0, device="cpu")
    objective_of(net)(images, labels, mask, t, noise)["loss"].mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.any(), name


def test_autocast_losses_are_fp32_and_near():
    net = small_net()
    images, labels, t, noise = batch_of(net)
    mask = sample_mask(3, LENGTH, 5, seed=0, device="cpu")
    exact = objective_of(net)(images, labels, mask, t, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = objective_of(net)(images, labels, mask, t, noise)
    for name, part in parts.items():
        assert part.dtype == torch.float32, name
        assert_near(part, exact[name], network_steps(4), dtype=torch.bfloat16, name=name)


@pytest.mark.parametrize("keep", [None, 6])
def test_objective_compiles_without_a_graph_break(keep):
    objective = objective_of(small_net())
    images, labels, t, noise = batch_of(objective.net)
    mask = None if keep is None else sample_mask(3, LENGTH, keep, seed=0, device="cpu")
    expected = objective(images, labels, mask, t, noise)
    expected["loss"].mean().backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in objective.named_parameters() if keep or "mask" not in name
    }
    objective.zero_grad()
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    parts = compiled(images, labels, mask, t, noise)
    parts["loss"].mean().backward()
    assert parts.keys() == expected.keys()
    for name, part in parts.items():
        assert_near(part, expected[name], network_steps(4), name=name)
    compiled_gradients = {name: objective.get_parameter(name).grad for name in gradients}
    assert_network_accurate(compiled_gradients, gradients, network_steps(4, backward=True))


def test_a_term_returns_the_losses_that_it_has_weights_of():
    objective = Objective(small_net(), [Size({"width": 1.0})])
    images, labels, t, noise = batch_of(objective.net)
    with pytest.raises(ValueError, match=r"a term has weights of \['width'\], and returned losses \['size'\]"):
        objective(images, labels, None, t, noise)


@pytest.mark.parametrize("shape", [(2,), (1,), (3, 1, 1, 1)])
def test_a_time_for_each_sample(shape):
    objective = objective_of(small_net())
    images, labels, _, noise = batch_of(objective.net)
    message = rf"t must have shape \(3,\), not \({', '.join(map(str, shape))}"
    with pytest.raises(ValueError, match=message):
        objective(images, labels, None, torch.ones(shape), noise)
    with pytest.raises(ValueError, match=message):
        objective.mixed([images], labels, [None], torch.ones(shape), [noise])


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (3, 3, 8, 4)])
def test_noise_of_another_shape(shape):
    objective = objective_of(small_net())
    images, labels, t, _ = batch_of(objective.net)
    with pytest.raises(ValueError, match=r"noise must have the shape of its images, \(3, 3, 8, 8\), not "):
        objective(images, labels, None, t, torch.randn(shape))
