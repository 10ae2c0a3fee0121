"""Deferred masking's network: its paper's formulas, and what the kept tokens know of the dropped ones."""

import dataclasses

import pytest
import torch
from routes import assert_trains_as, inputs, reference, routed, unequal_mask

from fastmask.diffusion import EDM, Denoiser, KeptDenoising, Objective
from fastmask.diffusion.masking import structured_mask
from fastmask.diffusion.weights import save_weights, weights_for
from fastmask.kernels import sample_mask
from fastmask.models.deferred import DeferredConfig
from fastmask.models.stack import all_blocks
from fastmask.testing import assert_near, network_steps

CONFIG = DeferredConfig(width=16, depth=3, num_heads=2, mixer_width=8, mixer_depth=2, mixer_num_heads=1)
BLOCKS = CONFIG.depth + CONFIG.mixer_depth
CPU = torch.device("cpu")


def deferred(mixer, leave, backbone, keep):
    """Return the kept tokens after the backbone, of each sample; ``keep`` holds their positions, None for all."""

    def run(h, c):
        h = leave(mixer(h, c), c)
        if keep is None:
            return backbone(h, c)
        return torch.cat([backbone(h[b : b + 1, ids], c[b : b + 1]) for b, ids in enumerate(keep)])

    return run


def masks(model, batch=3):
    side = int(model.length**0.5)
    return {
        "none": None,
        "one": sample_mask(batch, model.length, 1, seed=0, device="cpu"),
        "random": sample_mask(batch, model.length, 5, seed=0, device="cpu"),
        "all": sample_mask(batch, model.length, model.length, seed=0, device="cpu"),
        "structured": structured_mask(batch, side, seed=0, offset=0, device=CPU),
    }


def kept(mask):
    return None if mask is None else [ids.long() for ids in mask.ids_keep]


@pytest.mark.parametrize("kind", ["none", "one", "random", "all", "structured"])
def test_forward_and_gradients(kind):
    """Raw tokens of the kept positions, and zeros at the others."""
    model = routed(CONFIG)
    mask = masks(model)[kind]

    def seen(raw):
        if mask is None:
            return raw
        assert not raw[mask.dropped].any()
        return torch.stack([tokens[ids] for tokens, ids in zip(raw, kept(mask), strict=True)])

    assert_trains_as(model, mask, lambda _, *parts: deferred(*parts, kept(mask)), seen=seen)


@pytest.mark.parametrize("channels", [1, 3, 4])  # P = 4 and 12 are no multiples of 8, as 16 is
def test_any_number_of_patch_values(channels):
    model = CONFIG.build(channels, 8, 5)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    x, c_noise, labels = inputs(model)
    raw = model(x, c_noise, labels, masks(model)["random"])
    assert raw.shape == (3, 16, 4 * channels)
    assert (raw != 0).sum() == 3 * 5 * 4 * channels


def test_nothing_dropped_is_no_mask():
    model = routed(CONFIG)
    x, c_noise, labels = inputs(model)
    assert_near(model(x, c_noise, labels, masks(model)["all"]), model(x, c_noise, labels), network_steps(BLOCKS))


def test_the_kept_tokens_know_of_the_dropped_ones():
    """By the mixer alone: without its attention they do not."""
    model = routed(CONFIG)
    x, c_noise, labels = inputs(model)
    mask = masks(model)["random"]
    changed, (row, column) = x.clone(), divmod(int(mask.dropped[0].nonzero()[0]), 4)
    changed[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1
    assert not torch.equal(model(changed, c_noise, labels, mask)[0], model(x, c_noise, labels, mask)[0])
    for block in model.mixer:
        torch.nn.init.zeros_(block.attn.proj.weight)
    assert torch.equal(model(changed, c_noise, labels, mask)[0], model(x, c_noise, labels, mask)[0])


def test_the_loss_is_the_mean_over_the_kept_patches():
    """Of weight (D - x)^2, and without a mask over all."""
    net = Denoiser(routed(CONFIG), EDM())
    x, _, labels = inputs(net.model)
    t, noise = torch.tensor([0.1, 0.7, 3.0]), torch.randn_like(x)
    noised, c = net.process.noised(x, noise, t), net.process.coefficients(t)
    for mask in (masks(net.model)["random"], None):
        losses = Objective(net, [KeptDenoising()])(x, labels, mask, t, noise)
        squared = (c.weight[:, None, None, None] * (net(noised, t, labels, mask) - x).square()).double()
        patches = squared.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((1, 3, 5)).flatten(1)
        seen = torch.ones_like(patches) if mask is None else (~mask.dropped).double()
        assert_near(losses["denoising"], (patches * seen).sum(1) / seen.sum(1), 4)
        assert losses.keys() == {"loss", "denoising"}


def test_the_stacks():
    model = routed(CONFIG)
    assert [(len(stack.blocks), stack.width, stack.num_heads) for stack in model.stacks] == [(2, 8, 1), (3, 16, 2)]
    assert [stack.tokens_of(16, 4) for stack in model.stacks] == [16, 4]
    assert [*all_blocks(model.stacks)] == [*model.mixer, *model.blocks]


def test_a_fresh_network_learns_in_every_part():
    """After the first step, which moves the head from zero, all parts have gradients."""
    torch.manual_seed(0)
    model = CONFIG.build(3, 8, 5)
    x, c_noise, labels = inputs(model)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    model(x, c_noise, labels, masks(model)["random"]).square().sum().backward()
    for part in (model.x_embedder.proj, model.mixer_exit.linear, model.blocks[0].adaLN_modulation[1]):
        assert part.weight.grad.any()


def test_unequal_numbers_of_kept_tokens():
    model = routed(CONFIG)
    x, c_noise, labels = inputs(model, batch=8)
    mask, keep = unequal_mask(model.length, 0.5, 0.9)
    raw = model(x, c_noise, labels, mask)
    assert not raw[mask.dropped].any()
    for b, ids in enumerate(keep):
        one = slice(b, b + 1)
        exact = reference(model, x[one], c_noise[one], labels[one], lambda *parts, ids=ids: deferred(*parts, [ids]))
        assert_near(raw[b, ids], exact[0], network_steps(BLOCKS))


def test_images_of_several_sizes():
    model = routed(CONFIG)
    wide, (x, c_noise, labels) = torch.randn(2, 3, 4, 12), inputs(model)
    mask = masks(model)["structured"]
    times, both = torch.cat([c_noise, c_noise[:2]]), torch.cat([labels, labels[:2]])
    ours = model.forward_mixed([x, wide], times, both, [mask, None])
    assert_near(ours[0], model(x, c_noise, labels, mask), network_steps(BLOCKS))
    assert_near(ours[1], model.forward_mixed([wide], c_noise[:2], labels[:2], [None])[0], network_steps(BLOCKS))


def test_recomputed_blocks_have_the_same_gradients():
    model = routed(CONFIG)
    x, c_noise, labels = inputs(model)
    found = []
    for again in (False, True):
        model.checkpoint_blocks = again
        model.zero_grad()
        model(x, c_noise, labels, masks(model)["random"]).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("kind", ["none", "random"])
def test_one_graph(kind):
    model = routed(CONFIG)
    x, c_noise, labels = inputs(model)
    mask = masks(model)[kind]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x, c_noise, labels, mask), model(x, c_noise, labels, mask), network_steps(BLOCKS))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["none", "random"])
def test_bf16_autocast_keeps_the_residual_stream_in_fp32(kind):
    model = routed(CONFIG)
    x, c_noise, labels = inputs(model)
    mask, seen = masks(model)[kind], []
    for block in (model.mixer[0], model.blocks[0], model.blocks[2]):
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].x.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        raw = model(x, c_noise, labels, mask)
    assert_near(raw, model(x, c_noise, labels, mask), network_steps(BLOCKS), dtype=torch.bfloat16)
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mixer_depth": 0}, "depth and mixer_depth must be at least 1, not 3 and 0; without a mixer"),
        ({"depth": 0}, "depth and mixer_depth must be at least 1, not 0 and 2"),
        ({"mixer_width": 10}, "mixer_width must be a multiple of 4"),
        ({"mixer_num_heads": 3}, "mixer_width 8 does not divide into mixer_num_heads 3"),
        ({"num_heads": 5}, "width 16 does not divide into num_heads 5"),
        ({"patch_size": 3}, "an image side of 8 does not divide into patches of 3"),
    ],
)
def test_sizes_that_cannot_be(changed, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changed).build(3, 8, 5)


def test_heads_of_a_mixer_are_compared(tmp_path):
    def network(heads):
        config = DeferredConfig(width=16, depth=1, mixer_width=16, mixer_depth=1, mixer_num_heads=heads)
        return Denoiser(config.build(3, 8, 5), EDM())

    save_weights(tmp_path / "weights.safetensors", network(2))
    weights_for(network(2), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="is of another network: its mixer_num_heads is 2 instead of 4"):
        weights_for(network(4), tmp_path / "weights.safetensors")
