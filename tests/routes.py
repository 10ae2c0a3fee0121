"""Networks some of whose blocks see the kept tokens only, beside their papers' formulas in PyTorch and float64."""

import itertools
import math

import torch
import torch.nn.functional as F

from fastmask.diffusion.masking import RatioPerSample
from fastmask.kernels import sample_mask
from fastmask.models.stack import all_blocks
from fastmask.testing import assert_near, assert_network_accurate, network_steps


def routed(config, seed=0):
    """Return a tiny network of 8 x 8 images and 5 classes in which no weight is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = config.build(3, 8, 5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=(parameter[0].numel() if parameter.ndim > 1 else 10) ** -0.5)
    return model


def inputs(model, batch=3, dtype=torch.float32):
    """Return images, noise conditions and labels, the last of them none."""
    x = torch.randn(batch, model.in_channels, model.input_size, model.input_size, dtype=dtype)
    labels = torch.arange(batch) % model.num_classes
    labels[-1] = model.num_classes
    return x, torch.linspace(-1.5, 1.0, batch, dtype=dtype), labels


def reference(model, x, c_noise, labels, connect, w=None):
    """Return F in float64 with PyTorch's own layers.

    Args:
        model: the network, for its sizes and weights.
        x: images.
        c_noise: noise conditions.
        labels: class ids.
        connect: takes the blocks before, in and after the route (of deferred masking: the mixer, its exit and the
            blocks), each a function of tokens and condition, and returns the function of the tokens and the condition
            that the paper defines.
        w: the weights by name; None is the network's own.
    """
    w = {name: tensor.detach().double() for name, tensor in model.state_dict().items()} if w is None else w

    def linear(name, h):
        return F.linear(h, w[f"{name}.weight"], w[f"{name}.bias"])

    def modulated(h, shift, scale):
        return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def projected(name, h, c):
        shift, scale = linear(f"{name}.adaLN_modulation.1", F.silu(c)).chunk(2, 1)
        return linear(f"{name}.linear", modulated(h, shift, scale))

    def block(name, heads, h, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{name}.adaLN_modulation.1", F.silu(c)).chunk(6, 1)
        b, n, width = h.shape
        qkv = linear(f"{name}.attn.qkv", modulated(h, shift1, scale1)).view(b, n, 3, heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)
        attended = (scores @ v).transpose(1, 2).reshape(b, n, width)
        h = h + gate1[:, None] * linear(f"{name}.attn.proj", attended)
        hidden = F.gelu(linear(f"{name}.mlp.fc1", modulated(h, shift2, scale2)), approximate="tanh")
        return h + gate2[:, None] * linear(f"{name}.mlp.fc2", hidden)

    def blocks(first, stop, name="blocks", heads=model.num_heads):
        def run(h, c):
            for i in range(first, stop):
                h = block(f"{name}.{i}", heads, h, c)
            return h

        return run

    x, c_noise = x.double(), c_noise.double()
    angle = c_noise[:, None] * 10000.0 ** (-torch.arange(128) / 128.0).double()
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], 1))))
    known = (labels < model.num_classes)[:, None]
    c = c + known * w["y_embedder.embedding_table.weight"].T[labels.clamp(max=model.num_classes - 1)]
    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=model.patch_size)
    h = h.flatten(2).mT + w["pos_embed"]
    config = model.config
    if config.name == "deferred":
        mixer = blocks(0, config.mixer_depth, "mixer", config.mixer_num_heads)
        parts = mixer, lambda h, c: projected("mixer_exit", h, c), blocks(0, config.depth)
    else:
        ends = 0, config.route_start, config.route_end, config.depth
        parts = [blocks(*part) for part in itertools.pairwise(ends)]
    return projected("final_layer", connect(*parts)(h, c), c)


def assert_trains_as(model, mask, connect, condition=None, seen=lambda raw: raw):
    """Compare output and every gradient with the paper's formulas.

    Args:
        model: the network, in float32.
        mask: its mask.
        connect: as in `reference`, after the weights by name.
        condition: what the network is given in place of the labels, made from them; None is the labels.
        seen: the part of the raw tokens that is compared.
    """
    x, c_noise, labels = inputs(model)
    w = {name: tensor.detach().double().requires_grad_() for name, tensor in model.state_dict().items()}
    exact = reference(model, x, c_noise, labels, lambda *parts: connect(w, *parts), w)
    raw = seen(model(x, c_noise, labels if condition is None else condition(labels), mask))
    depth = len([*all_blocks(model.stacks)])
    assert_near(raw, exact, network_steps(depth))
    probe = torch.randn_like(exact)
    raw.backward(probe.float())
    exact.backward(probe)
    parameters = dict(model.named_parameters())

    def gradients(tensors):
        """Zeros for what has no part in the result, such as the mask token without a mask."""
        return {n: torch.zeros_like(tensors[n]) if tensors[n].grad is None else tensors[n].grad for n in parameters}

    assert_network_accurate(gradients(parameters), gradients(w), network_steps(depth, backward=True))


def unequal_mask(length, lowest, highest):
    """Return a packed mask of eight samples, with ratios between these, and the kept ids of each sample."""
    ratios = RatioPerSample("uniform", lowest, highest)
    counts = ratios.keep(0, torch.arange(8), torch.zeros(8), length)
    mask = sample_mask(8, length, counts, seed=0, device="cpu", total=ratios.total(8, length))
    assert len(set(counts.tolist())) > 1
    return mask, [ids.long() for ids in torch.split(mask.ids_keep, counts.tolist())]
