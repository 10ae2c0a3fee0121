import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from util import SMALL_SIZES, golden, small_net

from fastmask import Mask, MaskDiT
from fastmask.kernels import sample_mask
from fastmask.testing import assert_near, network_steps

# The published sizes (width, depth, heads), and the trainable parameters in millions of MaskDiT and of the plain DiT.
PUBLISHED = {
    "S": (384, 12, 6, 68.1, 32.9),
    "B": (768, 12, 12, 175.6, 130.3),
    "L": (1024, 24, 16, 509.8, 457.8),
    "XL": (1152, 28, 16, 730.1, 674.8),
    "H": (1280, 32, 16, 1009.5, 950.9),
}


# Networks that differ in what a forward pass does: decoder or none, labels or none, one block, other patches.
VARIANTS = [
    {},
    {"decoder_depth": 0},
    {"num_classes": 0},
    {"depth": 1, "decoder_depth": 1, "patch_size": 4, "in_channels": 1},
    {"input_size": 6, "decoder_width": 16, "decoder_num_heads": 1},
]


def inputs(model, batch=3, dtype=torch.float32):
    x = torch.randn(batch, model.in_channels, model.input_size, model.input_size).to(dtype)
    c_noise = torch.linspace(-1.5, 1.0, batch).to(dtype)
    return x, c_noise, torch.arange(batch)


def forward_by_the_paper(model, x, c_noise, labels, mask):
    """F as the method's description has it: all positions embedded, one block after another, in float64."""
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    x, c_noise = x.double(), c_noise.double()

    def linear(name, h):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def modulated(h, shift, scale):
        h = (h - h.mean(-1, keepdim=True)) / torch.sqrt(h.var(-1, correction=0, keepdim=True) + 1e-6)
        return h * (1 + scale[:, None]) + shift[:, None]

    def attended(name, h, heads):
        b, n, width = h.shape
        q, k, v = linear(f"{name}.qkv", h).view(b, n, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        scores = torch.softmax(q @ k.mT / math.sqrt(width // heads), -1)
        return linear(f"{name}.proj", (scores @ v).transpose(1, 2).reshape(b, n, width))

    def block(name, h, c, heads):
        modulation = linear(f"{name}.adaLN_modulation.1", F.silu(c))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, 1)
        h = h + gate1[:, None] * attended(f"{name}.attn", modulated(h, shift1, scale1), heads)
        hidden = F.gelu(linear(f"{name}.mlp.fc1", modulated(h, shift2, scale2)), approximate="tanh")
        return h + gate2[:, None] * linear(f"{name}.mlp.fc2", hidden)

    def modulated_linear(name, h, c):
        shift, scale = linear(f"{name}.adaLN_modulation.1", F.silu(c)).chunk(2, 1)
        return linear(f"{name}.linear", modulated(h, shift, scale))

    angle = c_noise[:, None] * 10000.0 ** (-torch.arange(128) / 128.0).double()
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], 1))))
    if model.num_classes:
        one_hot = F.one_hot(labels, model.num_classes + 1)[:, :-1].double()
        c = c + one_hot @ w["y_embedder.embedding_table.weight"].T
    convolved = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=model.patch_size)
    h = convolved.flatten(2).mT + w["pos_embed"]
    if mask is not None:
        h = torch.stack([row[ids.long()] for row, ids in zip(h, mask.ids_keep, strict=True)])
    for i in range(len(model.blocks)):
        h = block(f"blocks.{i}", h, c, model.num_heads)
    if model.decoder_blocks:
        h = modulated_linear("decoder_layer", h, c)
        if mask is not None:
            kept, h = h, w["mask_token"].expand(len(h), model.length, -1).clone()
            for b, ids in enumerate(mask.ids_keep):
                h[b, ids.long()] = kept[b]
        h = h + w["decoder_pos_embed"]
        for i in range(len(model.decoder_blocks)):
            h = block(f"decoder_blocks.{i}", h, c, model.decoder_num_heads)
    return modulated_linear("final_layer", h, c)


@pytest.mark.parametrize("keep", [None, 1, 3])
@pytest.mark.parametrize("sizes", VARIANTS, ids=str)
def test_forward(sizes, keep):
    model = small_net(**sizes).model
    x, c_noise, labels = inputs(model)
    labels[1] = model.num_classes
    mask = None if keep is None else sample_mask(3, model.length, keep, seed=0, device="cpu")
    if mask is not None and not model.decoder_blocks:
        with pytest.raises(ValueError, match=r"without a decoder \(decoder_depth=0\) cannot fill in dropped patches"):
            model(x, c_noise, labels, mask)
        return
    exact = forward_by_the_paper(model, x, c_noise, labels, mask)
    raw = model(x, c_noise, labels, mask)
    assert raw.dtype == torch.float32
    assert_near(raw, exact, network_steps(len(model.blocks) + len(model.decoder_blocks)))
    # The frequencies of the time embedding are fp32 numbers in a float64 network too.
    assert_near(model.double()(x.double(), c_noise.double(), labels, mask), exact, dtype=torch.float32)


def test_image_scale_multiplies_the_images():
    model = small_net().model
    x, c_noise, labels = inputs(model)
    scale = torch.tensor([0.5, 2.0, 4.0])
    # Powers of two: the same bits whether images or patches are scaled.
    scaled = model(scale[:, None, None, None] * x, c_noise, labels)
    assert torch.equal(model(x, c_noise, labels, image_scale=scale), scaled)


def test_bf16_network():
    net = small_net()
    x, c_noise, labels = inputs(net.model, dtype=torch.bfloat16)
    mask = sample_mask(3, net.model.length, 7, seed=0, device="cpu")
    raw = net.model.to(torch.bfloat16)(x, c_noise, labels, mask)
    assert raw.dtype == torch.bfloat16
    # Of the rounded weights and inputs: what remains is the rounding of every layer's result.
    assert_near(raw, forward_by_the_paper(net.model, x, c_noise, labels, mask), network_steps(4))


def test_int64_masks_are_masks_too():
    model = small_net().model
    mask = sample_mask(3, model.length, 5, seed=0, device="cpu")
    wide = Mask(mask.ids_keep.long(), mask.ids_restore.long())
    x, c_noise, labels = inputs(model)
    assert torch.equal(model(x, c_noise, labels, wide), model(x, c_noise, labels, mask))


def test_samples_do_not_see_each_other():
    model = small_net().double().model
    x, c_noise, labels = inputs(model, dtype=torch.float64)
    mask = sample_mask(3, model.length, 5, seed=0, device="cpu")
    whole = model(x, c_noise, labels, mask)
    for b in range(3):
        part = slice(b, b + 1)
        alone = model(x[part], c_noise[part], labels[part], Mask(mask.ids_keep[part], mask.ids_restore[part]))
        assert_near(whole[part], alone, network_steps(4))


@pytest.mark.parametrize("decoder_depth", [0, 2])
def test_a_fresh_network_is_zero(decoder_depth):
    model = MaskDiT(**{**SMALL_SIZES, "decoder_depth": decoder_depth})
    assert not model(*inputs(model)).any()


def test_initialisation():
    model = MaskDiT(16, 2, 4, width=64, depth=2, num_heads=4, num_classes=50, decoder_width=48, decoder_depth=2)
    zero = ("adaLN_modulation.1.weight", "decoder_layer.linear.weight", "final_layer.linear.weight", ".bias")
    normal = ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "embedding_table.weight", "mask_token")
    uniform = ("x_embedder.proj.weight", "qkv.weight", "attn.proj.weight", "fc1.weight", "fc2.weight")
    for name, parameter in model.named_parameters():
        parameter = parameter.detach()
        assert sum(name.endswith(kind) for kind in (zero, normal, uniform)) == 1, name
        # Five standard errors of the mean and of the variance.
        bound = 5 / math.sqrt(parameter.numel())
        if name.endswith(zero):
            assert not parameter.any(), name
        elif name.endswith(normal):
            z = parameter / 0.02
            assert abs(z.mean()) < bound, name
            assert abs(z.square().mean() - 1) < bound * math.sqrt(2), name
        else:
            rows = parameter.flatten(1)
            u = rows / math.sqrt(6 / sum(rows.shape))
            assert u.abs().max() <= 1 + 1e-6, name
            assert abs(u.mean()) < bound * math.sqrt(1 / 3), name
            assert abs(u.square().mean() - 1 / 3) < bound * math.sqrt(4 / 45), name


def test_names_and_shapes_are_the_published_ones():
    config = golden().info["config"]
    model = MaskDiT(
        config["input_size"],
        config["patch_size"],
        config["in_channels"],
        config["hidden_size"],
        config["depth"],
        config["num_heads"],
        config["num_classes"],
        config["decoder_hidden_size"],
        config["decoder_depth"],
        config["decoder_num_heads"],
    )
    shapes = {f"model.{name}": list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == golden().info["parameters"]
    assert {f"model.{name}" for name, _ in model.named_parameters()} == golden().info["grad_norms"].keys()


@pytest.mark.parametrize("size", PUBLISHED)
def test_trainable_parameters_of_the_published_sizes(size):
    width, depth, heads, masked, dense = PUBLISHED[size]
    for decoder_depth, millions in [(8, masked), (0, dense)]:
        with torch.device("meta"):
            model = MaskDiT(width=width, depth=depth, num_heads=heads, decoder_depth=decoder_depth)
        assert round(sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6, 1) == millions


def test_the_default_is_the_published_xl():
    with torch.device("meta"):
        model, named = MaskDiT(), MaskDiT(32, 2, 4, 1152, 28, 16, 1000, 512, 8, 16)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in named.named_parameters()}
    assert (model.num_heads, model.decoder_num_heads, model.length) == (16, 16, 256)


def test_a_plain_dit_has_no_decoder_weights():
    names = small_net(decoder_depth=0).model.state_dict()
    assert not [name for name in names if "decoder" in name or "mask_token" in name]


def test_no_label_is_the_zero_vector():
    model = small_net().model
    x, c_noise, labels = inputs(model)
    none = torch.full_like(labels, model.num_classes)
    without, with_labels = model(x, c_noise, none), model(x, c_noise, labels)
    with torch.no_grad():
        model.y_embedder.embedding_table.weight.zero_()
    assert torch.equal(model(x, c_noise, labels), without)
    for row in range(3):
        assert not torch.equal(with_labels[row], without[row])


def test_an_unconditional_network_ignores_labels():
    model = small_net(num_classes=0).model
    x, c_noise, labels = inputs(model)
    assert torch.equal(model(x, c_noise, labels), model(x, c_noise, labels + 7))
    assert not [name for name in model.state_dict() if "y_embedder" in name]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"input_size": 9}, "an image side of 9 does not divide into patches of 2"),
        ({"input_size": 1}, "an image side of 1 does not divide into patches of 2"),
        ({"input_size": 0}, "an image side of 0 does not divide into patches of 2"),
        ({"patch_size": 0}, "an image side of 8 does not divide into patches of 0"),
        ({"depth": 0}, "depth must be at least 1 and decoder_depth at least 0, not 0 and 2"),
        ({"decoder_depth": -1}, "depth must be at least 1 and decoder_depth at least 0, not 2 and -1"),
        ({"width": 18}, "^width must be a multiple of 4 .*, not 18"),
        ({"width": 0}, "^width must be a multiple of 4 .*, not 0"),
        ({"decoder_width": 10}, "decoder_width must be a multiple of 4 .*, not 10"),
        ({"num_heads": 3}, "^width 16 does not divide into num_heads 3"),
        ({"num_heads": 0}, "^width 16 does not divide into num_heads 0"),
        ({"decoder_num_heads": 5}, "decoder_width 12 does not divide into decoder_num_heads 5"),
    ],
)
def test_sizes_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        MaskDiT(**{**SMALL_SIZES, **sizes})


def test_decoder_sizes_do_not_matter_without_a_decoder():
    model = MaskDiT(**{**SMALL_SIZES, "decoder_depth": 0, "decoder_width": 10, "decoder_num_heads": 7})
    assert model(*inputs(model)).shape == (3, 16, 12)


def test_conditions_that_do_not_fit():
    model = small_net().model
    x, c_noise, labels = inputs(model)
    with pytest.raises(ValueError, match=r"c_noise must have shape \(3,\), not \(1,\)"):
        model(x, c_noise[:1], labels)
    for wrong in (labels[:1], labels[:, None], labels.float()):
        with pytest.raises(ValueError, match=r"labels must be int64 of shape \(3,\), not "):
            model(x, c_noise, wrong)


@pytest.mark.parametrize("shape", [(3, 3, 8, 6), (3, 4, 8, 8), (3, 3, 16, 16)])
def test_images_of_another_shape(shape):
    model = small_net().model
    _, c_noise, labels = inputs(model)
    with pytest.raises(ValueError, match=r"images must have shape \(3, 3, 8, 8\), not "):
        model(torch.zeros(shape), c_noise, labels)


@pytest.mark.once
def test_importing_brings_torch_and_little_else():
    """Nor does any other part of these: the package imports both."""
    code = "import importlib, json, sys\n"
    code += "def imported(name): importlib.import_module(name); return sorted(sys.modules)\n"
    code += "print(json.dumps([imported(name) for name in ('torch', 'fastmask.kernels', 'fastmask.diffusion')]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, *after = ({line.split(".")[0] for line in names} for names in json.loads(result.stdout))
    for found in after:
        brought = found - before
        assert "fastmask" in brought
        assert not brought & {"triton", "sklearn", "scipy", "tensorboard", "matplotlib", "PIL", "tyro", "rich"}
