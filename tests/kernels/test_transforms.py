"""The ops under torch.func and forward-mode AD, and the switch that chooses the form of all of them."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from util import batch_of, small_net

from fastmask import kernels as K
from fastmask.testing import assert_near

B, L, D, E = 2, 6, 16, 24
SHIFT, SCALE, GATE = torch.randn(3, B, D, generator=torch.Generator().manual_seed(0))
WEIGHT, BIAS = torch.randn(E, D), torch.randn(E)
PATCHES, POSITION = (torch.randn(D, 4, 2, 2), torch.randn(D)), torch.randn(L, D)
MASK = K.sample_mask(B, L, 3, seed=0, device="cpu")

# Functions of tokens (B, L, D), or of images for the last two.
OPS = {
    "modulate_norm": lambda x, **how: K.modulate_norm(x, SHIFT, SCALE, **how),
    "add_gated_norm": lambda x, **how: K.add_gated_norm(x, x, GATE, SHIFT, SCALE, **how)[1],
    "modulated_linear": lambda x, **how: K.modulated_linear(x, SHIFT, SCALE, WEIGHT, BIAS, **how),
    "add_gated_linear": lambda x, **how: K.add_gated_linear(x, x, GATE, SHIFT, SCALE, WEIGHT, BIAS, **how)[1],
    "gelu_linear": lambda x, **how: K.gelu_linear(x, WEIGHT, BIAS, **how),
    "silu_linear": lambda x, **how: K.silu_linear(x[:, 0], WEIGHT, BIAS, **how),
    "gather_tokens": lambda x, **how: K.gather_tokens(x, MASK.ids_keep, **how),
    "restore_tokens": lambda x, **how: K.restore_tokens(x[:, :3], SHIFT[0], POSITION, MASK.ids_restore, **how),
    "embed_kept_patches": lambda x, **how: K.embed_kept_patches(
        x.reshape(B, 4, 4, 6), *PATCHES, POSITION, MASK.ids_keep, patch_size=2, **how
    ),
    "masked_loss": lambda x, **how: K.masked_loss(
        x, x.reshape(B, 4, 4, 6), x.reshape(B, 4, 4, 6), *torch.ones(3, B), MASK, patch_size=2, **how
    )[0],
    "attention": lambda x, **how: K.attention(*3 * [x.view(B, L, 2, 8)], **how),
}


@pytest.mark.parametrize("name", OPS)
def test_gradient_and_directional_derivative(name):
    """Those of the reference, which a kernel has no rules for, and which needs no asking."""
    op, x, direction = OPS[name], torch.randn(B, L, D), torch.randn(B, L, D)
    probe = torch.randn_like(op(x))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(op(leaf, impl="reference"), leaf, probe)
    assert_near(grad(lambda x: (op(x) * probe).sum())(x), expected, 20)
    slope = jvp(lambda x: (op(x, impl="reference") * probe).sum(), (x,), (direction,))[1]
    assert_near(jvp(lambda x: (op(x) * probe).sum(), (x,), (direction,))[1], (expected * direction).sum(), 200)
    assert_near(slope, (expected * direction).sum(), 200)
    with forward_ad.dual_level():
        moved = forward_ad.unpack_dual((op(forward_ad.make_dual(x, direction)) * probe).sum()).tangent
    assert_near(moved, slope, 4)


@pytest.mark.parametrize("name", ["modulate_norm", "modulated_linear", "gelu_linear", "attention"])
def test_vmap_is_a_loop(name):
    op, several = OPS[name], torch.randn(3, B, L, D)
    assert_near(vmap(op)(several), torch.stack([op(x, impl="reference") for x in several]), 20)


@pytest.mark.parametrize("name", OPS)
def test_the_fused_form_is_refused(name):
    op = OPS[name]
    if name in ("silu_linear", "attention"):  # PyTorch's own operators where no kernel of ours runs
        op = OPS["gelu_linear"]
    with pytest.raises(ValueError, match=r'no rules for torch\.func and forward-mode AD: pass impl="reference", or'):
        grad(lambda x: op(x, impl="fused").sum())(torch.randn(B, L, D))


def test_packed_attention_is_refused():
    ends = torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"packed attention has no rules for torch\.func"):
        grad(lambda q: K.attention(q, q, q, cu_seqlens=ends, max_seqlen=4).sum())(torch.randn(6, 2, 8))


def test_gradients_of_each_sample_of_a_network():
    """The usual recipe, vmap of grad of functional_call, on MaskDiT."""
    net = small_net()
    images, labels, t, _ = batch_of(net)
    labels = labels.clamp(max=net.model.num_classes - 1)
    model, weights = net.model, dict(net.model.named_parameters())

    def loss(weights, image, time, label):
        return functional_call(model, weights, (image[None], time[None], label[None])).square().sum()

    for i in range(len(images)):
        ours = grad(loss)(weights, images[i], t[i], labels[i])
        model.zero_grad()
        model(images[i : i + 1], t[i : i + 1], labels[i : i + 1]).square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert_near(ours[name], parameter.grad, 500, name=name)


def test_one_switch_for_all_ops():
    x, names = torch.randn(B, L, D), [name for name in OPS if name not in ("silu_linear", "attention", "masked_loss")]
    expected = {name: OPS[name](x, impl="reference") for name in names}
    with K.implementation("reference"):
        assert all(torch.equal(OPS[name](x), expected[name]) for name in names)
        with K.implementation("fused"):
            assert all(torch.equal(OPS[name](x), OPS[name](x, impl="fused")) for name in names)
        assert torch.equal(OPS["modulate_norm"](x), expected["modulate_norm"])
    assert K.implementation("reference")(lambda: OPS["modulate_norm"](x))().equal(expected["modulate_norm"])
    with pytest.raises(ValueError, match='impl must be "fused", "reference" or None'), K.implementation("triton"):
        pass
    with pytest.raises(KeyError), K.implementation("reference"):
        raise KeyError
    # The choice ended with each block, by an error too.
    leaf = x.clone().requires_grad_()
    fused = K.modulate_norm(leaf, SHIFT, SCALE, impl="fused")
    with K.implementation("fused"):
        assert K.modulate_norm(leaf, SHIFT, SCALE).grad_fn.name() == fused.grad_fn.name()


def test_a_compiled_function_follows_the_switch():
    seen = []

    def backend(graph, inputs):
        seen.append({str(node.target) for node in graph.graph.nodes})
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: K.modulate_norm(x, SHIFT, SCALE), fullgraph=True, backend=backend)
    x = torch.randn(B, L, D)
    for form in ("fused", "reference", "fused"):
        with K.implementation(form):
            assert_near(compiled(x), K.modulate_norm(x, SHIFT, SCALE, impl="reference"), 4)
    fused, reference = (any("fastmask" in name for name in names) for names in seen)
    assert (fused, reference) == (True, False)
    torch._dynamo.reset()
