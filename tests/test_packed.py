"""Samples that keep unequal numbers of patches, and images of several sizes: packed, they are what they are alone."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks
from util import SMALL_SIZES, small_net

from fastmask import Mask, MaskDiT
from fastmask.diffusion import EDM, MaskedDenoising, Objective, training_draws
from fastmask.diffusion.masking import GROUP, parse_per_sample
from fastmask.kernels import sample_mask
from fastmask.models.block_config import BlockConfig
from fastmask.models.layers import Attention, Packing, sincos_position
from fastmask.testing import assert_near, assert_network_accurate, network_steps, relative_error

LENGTH = 16  # positions of small_net
KEPT = [1, 16, 5]
# Widths that the native kernels take.
SIZES = {"width": 32, "decoder_width": 16, "decoder_num_heads": 2, "depth": 1, "decoder_depth": 1}
ALL_OPTIONS = {"qk_norm": True, "norm": "rms", "mlp": "swiglu", "rope": True}
FORMS = pytest.mark.parametrize("impl", ["fused", "reference"])


def network(*, impl=None, dtype=torch.float32, checkpoint_blocks=False, **sizes):
    net = small_net(**{**SIZES, **sizes}).to(dtype)
    net.model.impl, net.model.checkpoint_blocks = impl, checkpoint_blocks
    return net


def objective_of(net):
    return Objective(net, [MaskedDenoising()])


def unequal(kept, length=LENGTH, seed=0):
    keep = torch.tensor(kept)
    return sample_mask(len(kept), length, keep, total=sum(kept), seed=seed, device="cpu")


def sample_of(mask, b):
    """The dense mask of one sample."""
    if mask is None:
        return None
    rows = mask.ids_keep[b] if mask.cu_seqlens is None else mask.ids_keep[mask.cu_seqlens[b] : mask.cu_seqlens[b + 1]]
    return Mask(rows[None], mask.ids_restore[b : b + 1])


def batch_of(shapes, dtype=torch.float32):
    """Images of these shapes, labels (the last of them none) and times of all, and unit noise."""
    images, noise = ([torch.randn(shape, dtype=dtype) * scale for shape in shapes] for scale in (0.5, 1.0))
    batch = sum(map(len, images))
    labels = torch.arange(batch) % 5
    labels[-1] = 5
    return images, labels, torch.linspace(0.1, 2.0, batch, dtype=dtype), noise


def together(net, images, labels, masks, t, noise):
    """Raw tokens by size, and the losses, of a step with all samples at once."""
    objective, coefficients = objective_of(net), net.process.coefficients(t)
    noised = [net.process.noised(*part) for part in zip(images, noise, t.split(list(map(len, images))), strict=True)]
    if len(images) == 1:
        parts = objective(images[0], labels, masks[0], t, noise[0])
        return [net.raw_tokens(noised[0], coefficients, labels, masks[0])], parts
    return net.mixed_raw_tokens(noised, coefficients, labels, masks), objective.mixed(images, labels, masks, t, noise)


def alone(net, images, labels, masks, t, noise):
    """The same of a network for each size, sample after sample, dense."""
    raw, losses, first = [], [], 0
    for x, mask, unit in zip(images, masks, noise, strict=True):
        rows = []
        for b in range(len(x)):
            at, part = slice(b, b + 1), slice(first + b, first + b + 1)
            label, dense, time = labels[part], [sample_of(mask, b)], t[part]
            noised = net.process.noised(x[at], unit[at], time)
            rows.append(net.mixed_raw_tokens([noised], net.process.coefficients(time), label, dense)[0])
            losses.append(objective_of(net).mixed([x[at]], label, dense, time, [unit[at]]))
        raw.append(torch.cat(rows))
        first += len(x)
    return raw, {name: torch.cat([sample[name] for sample in losses]) for name in losses[0]}


def results(net, run, *batch):
    """Raw tokens and losses by name, and every parameter's gradient."""
    raw, parts = run(net, *batch)
    net.zero_grad()
    parts["loss"].mean().backward()
    named = {f"raw tokens {i}": part.detach() for i, part in enumerate(raw)}
    named |= {name: part.detach() for name, part in parts.items() if part.any()}
    return named, {name: parameter.grad for name, parameter in net.named_parameters()}


def check_packed(shapes, masks, impl, **options):
    """Hold a packed step, in float64 and in fp32, to the same samples one at a time in float64."""
    images, labels, t, noise = batch_of(shapes)
    narrow = images, labels, masks, t, noise
    wide = [x.double() for x in images], labels, masks, t.double(), [x.double() for x in noise]
    exact = results(network(impl="reference", dtype=torch.float64, **options), alone, *wide)
    packed = results(network(impl="reference", dtype=torch.float64, **options), together, *wide)
    fp32 = results(network(impl=impl, **options), together, *narrow)
    for outputs, gradients in (packed, fp32):
        assert outputs.keys() == exact[0].keys()
        for name, value in exact[0].items():
            assert_near(outputs[name], value, network_steps(2), name=name)
        assert_network_accurate(gradients, exact[1], network_steps(2, backward=True))


@FORMS
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, ALL_OPTIONS], ids=str)
def test_unequal_numbers_of_patches(impl, options):
    check_packed([(len(KEPT), 3, 8, 8)], [unequal(KEPT)], impl, **options)


@FORMS
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=str)
def test_several_sizes(impl, options):
    masks = [sample_mask(2, 4, 1, seed=0, device="cpu"), unequal([16, 3, 7]), None]
    check_packed([(2, 3, 8, 8), (3, 3, 16, 16), (2, 3, 8, 16)], masks, impl, patch_size=4, **options)


@FORMS
def test_several_sizes_without_a_decoder(impl):
    check_packed([(1, 3, 8, 16), (1, 3, 8, 8)], [None, None], impl, patch_size=4, decoder_depth=0)


def test_a_size_is_that_of_a_network_made_for_it():
    net = network(dtype=torch.float64)
    other = network(dtype=torch.float64, input_size=16)
    tables = ("pos_embed", "decoder_pos_embed")
    weights = {name: value for name, value in net.model.state_dict().items() if name not in tables}
    assert sorted(other.model.load_state_dict(weights, strict=False).missing_keys) == sorted(tables)
    images, labels, t, noise = batch_of([(2, 3, 16, 16), (3, 3, 8, 8)], torch.float64)
    masks = [unequal([64, 9], 64), sample_mask(3, 16, 5, seed=1, device="cpu")]
    parts = objective_of(net).mixed(images, labels, masks, t, noise)
    large, small = (
        objective_of(of)(images[i], labels[at], masks[i], t[at], noise[i])
        for of, i, at in ((other, 0, slice(2)), (net, 1, slice(2, 5)))
    )
    assert parts.keys() == large.keys() == small.keys()
    for name, part in parts.items():
        assert_near(part, torch.cat([large[name], small[name]]), network_steps(2), name=name)


def test_positions_of_an_oblong_grid():
    square, oblong = sincos_position(5, 5, 16)[0].view(5, 5, 16), sincos_position(3, 5, 16)[0].view(3, 5, 16)
    assert torch.equal(oblong, square[:3])
    assert torch.equal(sincos_position(5, 3, 16)[0].view(5, 3, 16), square[:, :3])


def test_one_size_is_the_same_bits_in_a_list():
    net = network()
    (images,), labels, t, (noise,) = batch_of([(3, 3, 8, 8)])
    for mask in (None, unequal(KEPT), sample_mask(3, LENGTH, 5, seed=0, device="cpu")):
        one = objective_of(net)(images, labels, mask, t, noise)
        listed = objective_of(net).mixed([images], labels, [mask], t, [noise])
        assert one.keys() == listed.keys()
        assert all(torch.equal(part, listed[name]) for name, part in one.items())


def test_equal_numbers_packed_are_dense():
    net = network(dtype=torch.float64)
    (images,), labels, t, (noise,) = batch_of([(3, 3, 8, 8)], torch.float64)
    dense = sample_mask(3, LENGTH, 5, seed=0, device="cpu")
    packed = unequal([5, 5, 5])
    assert torch.equal(packed.ids_keep, dense.ids_keep.flatten())
    noised, coefficients = net.process.noised(images, noise, t), net.process.coefficients(t)
    raw = [net.raw_tokens(noised, coefficients, labels, mask) for mask in (dense, packed)]
    assert_near(raw[1], raw[0], network_steps(2))


# Compiled


@pytest.mark.once
def test_a_packed_step_is_one_graph_for_every_draw():
    torch._dynamo.reset()
    objective = objective_of(network())
    images, labels = torch.randn(GROUP, 3, 8, 8), torch.arange(GROUP) % 5
    way = parse_per_sample("uniform(0.2,0.8)", 0.5)
    settings = {"length": LENGTH, "keep": 8, "drop": objective.net.model.drop, "label_drop": 0.1, "per_sample": way}

    def step(seed, offset):
        return objective(images, *training_draws(EDM(), images, labels, seed=seed, offset=offset, **settings))

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    seen = []
    for seed, group in ((0, 0), (0, 1), (7, 2**30)):
        tensors = torch.tensor(seed), torch.tensor(group * GROUP)
        gradients = []
        for run in (compiled, step):
            objective.zero_grad()
            parts = run(*tensors)
            parts["loss"].mean().backward()
            gradients.append((parts, {name: p.grad.clone() for name, p in objective.named_parameters()}))
        (parts, ours), (same, eager) = gradients
        assert parts.keys() == same.keys()
        for name, part in parts.items():
            assert_near(part, same[name], network_steps(2), name=name)
        assert_network_accurate(ours, eager, network_steps(2, backward=True))
        seen.append(parts["loss"])
    assert counter.frame_count == 1
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.once
def test_several_sizes_compile_into_one_graph():
    torch._dynamo.reset()
    objective = objective_of(network())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(objective.mixed, fullgraph=True, backend=counter)
    for seed in range(2):
        images, labels, t, noise = batch_of([(3, 3, 8, 8), (1, 3, 16, 16), (2, 3, 8, 16)])
        masks = [unequal(KEPT, seed=seed), None, sample_mask(2, 32, 7, seed=seed, device="cpu")]
        batch = images, labels, masks, t, noise
        parts, expected = compiled(*batch), objective.mixed(*batch)
        assert parts.keys() == expected.keys()
        for name, part in parts.items():
            assert_near(part, expected[name], network_steps(2), name=name)
    assert counter.frame_count == 1


# Blocks recomputed in backward


@pytest.mark.parametrize(
    ("shapes", "masks"),
    [
        ([(3, 3, 8, 8)], [None]),
        ([(3, 3, 8, 8)], [unequal(KEPT)]),
        ([(3, 3, 8, 8), (1, 3, 8, 16)], [unequal(KEPT), None]),
    ],
    ids=["dense", "packed", "sizes"],
)
def test_recomputed_blocks_give_the_same_gradients(shapes, masks):
    images, labels, t, noise = batch_of(shapes)
    (kept, gradients), (again, same) = (
        results(network(depth=2, qk_norm=True, checkpoint_blocks=by), together, images, labels, masks, t, noise)
        for by in (False, True)
    )
    assert kept.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in kept.items())
    for name, value in gradients.items():
        assert value is same[name] is None or torch.equal(value, same[name]), name


def test_recomputed_blocks_keep_less():
    images, labels, t, noise = batch_of([(3, 3, 8, 8)])
    kept = []
    for by in (False, True):
        net, storages = network(depth=4, checkpoint_blocks=by), {}
        with saved_tensors_hooks(
            lambda t, seen=storages: seen.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ):
            together(net, images, labels, [unequal(KEPT)], t, noise)
        weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
        kept.append(sum(t.untyped_storage().nbytes() for at, t in storages.items() if at not in weights))
    assert kept[1] < 0.6 * kept[0]


# Normalised queries and keys

STEPS = 5  # a norm, attention's three, a Linear


def attention_by_formula(block, qkv):
    """One sample's attention, softmax(q k^T / sqrt(D/H)) v with q and k of root-mean-square 1, scaled; (K, 3 D)."""
    heads = []
    for q, k, v in zip(*(part.chunk(block.num_heads, -1) for part in qkv.chunk(3, -1)), strict=True):
        q, k = (
            norm.weight * part / torch.sqrt(part.square().mean(-1, keepdim=True) + 1e-6)
            for norm, part in ((block.q_norm, q), (block.k_norm, k))
        )
        heads.append(torch.softmax(q @ k.T / math.sqrt(q.shape[-1]), -1) @ v)
    return torch.cat(heads, -1) @ block.proj.weight.T + block.proj.bias


def normed_attention():
    block = Attention(16, 2, BlockConfig(qk_norm=True)).double()
    for norm in (block.q_norm, block.k_norm):
        torch.nn.init.normal_(norm.weight, 1.0, 0.5)
    return block


def test_normalised_queries_and_keys_by_the_formula():
    block = normed_attention()
    qkv = torch.randn(3, 7, 48, dtype=torch.float64)
    exact = torch.stack([attention_by_formula(block, sample) for sample in qkv])
    assert_near(block(qkv, Packing()), exact, STEPS)
    cu_seqlens = torch.tensor([0, 2, 9, 21], dtype=torch.int32)
    rows = qkv.flatten(0, 1)
    exact = torch.cat([attention_by_formula(block, sample) for sample in rows.split([2, 7, 12])])
    assert_near(block(rows, Packing(cu_seqlens, 12)), exact, STEPS)
    single = Attention(16, 2, BlockConfig(qk_norm=True))
    single.load_state_dict(block.state_dict())
    assert_near(single(rows.float(), Packing(cu_seqlens, 12)), exact, STEPS)


def test_gradients_of_normalised_queries_and_keys():
    block = normed_attention()
    cu_seqlens = torch.tensor([0, 1, 5], dtype=torch.int32)

    def run(qkv, q_scale, k_scale):
        scales = {"q_norm.weight": q_scale, "k_norm.weight": k_scale}
        return torch.func.functional_call(block, scales, (qkv, Packing(cu_seqlens, 4)))

    leaves = [torch.randn(5, 48), block.q_norm.weight.detach(), block.k_norm.weight.detach()]
    assert torch.autograd.gradcheck(run, [leaf.double().requires_grad_() for leaf in leaves])


def test_names_of_the_scales():
    names = [f"{stack}.0.attn.{norm}.weight" for stack in ("blocks", "decoder_blocks") for norm in ("q_norm", "k_norm")]
    with_norm, without = (dict(network(qk_norm=by).model.named_parameters()) for by in (True, False))
    assert set(with_norm) - set(without) == set(names)
    assert [with_norm[name].shape for name in names] == [(16,), (16,), (8,), (8,)]
    fresh = MaskDiT(**{**SMALL_SIZES, **SIZES}, qk_norm=True)
    assert all(torch.equal(fresh.get_parameter(name), torch.ones_like(with_norm[name])) for name in names)


def test_large_queries_do_not_saturate_normalised_attention():
    block = normed_attention()
    qkv = torch.randn(1, 7, 48, dtype=torch.float64)
    scaled = torch.cat([qkv[..., :32] * 1e6, qkv[..., 32:]], -1)
    # The eps of the norm is no more there: it was 1e-6 beside squares of about 1.
    assert relative_error(block(scaled, Packing()), block(qkv, Packing())) < 1e-4


def test_autocast_of_normalised_queries_and_keys():
    (images,), labels, t, (noise,) = batch_of([(3, 3, 8, 8)])
    net = network(qk_norm=True)
    noised, coefficients = net.process.noised(images, noise, t), net.process.coefficients(t)
    exact = net.raw_tokens(noised, coefficients, labels, unequal(KEPT))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        raw = net.raw_tokens(noised, coefficients, labels, unequal(KEPT))
    assert raw.dtype == torch.bfloat16
    assert_near(raw, exact, network_steps(2))


# What cannot be


def test_lists_of_different_lengths():
    objective = objective_of(network())
    images, labels, t, noise = batch_of([(2, 3, 8, 8), (1, 3, 8, 16)])
    with pytest.raises(ValueError, match="needs lists of as much noise and as many masks, not 2, 1 and 2"):
        objective.mixed(images, labels, [None, None], t, noise[:1])
    with pytest.raises(ValueError, match="needs lists of as much noise and as many masks, not 2, 2 and 1"):
        objective.mixed(images, labels, [None], t, noise)
    with pytest.raises(ValueError, match="needs lists of as much noise and as many masks, not 0, 0 and 0"):
        objective.mixed([], labels, [], t, [])
    model = objective.net.model
    with pytest.raises(ValueError, match="needs a list of as many masks, not 2 and 1"):
        model.forward_mixed(images, t, labels, [None])
    with pytest.raises(ValueError, match="needs a list of as many masks, not 0 and 0"):
        model.forward_mixed([], t, labels, [])


@pytest.mark.parametrize("shape", [(1, 3, 8, 15), (1, 4, 8, 16), (3, 8, 16)])
def test_images_that_do_not_divide(shape):
    net = network()
    message = r"images must have shape \(B, 3, H, W\) of sides that patches of 2 divide, not "
    with pytest.raises(ValueError, match=message):
        net.model.forward_mixed(
            [torch.zeros(2, 3, 8, 8), torch.zeros(shape)], torch.zeros(3), torch.arange(3), [None] * 2
        )


def test_conditions_of_another_number():
    objective = objective_of(network())
    images, labels, t, noise = batch_of([(2, 3, 8, 8), (1, 3, 8, 16)])
    with pytest.raises(ValueError, match=r"must have shape \(3,\), not \(2,\)"):
        objective.mixed(images, labels, [None] * 2, t[:2], noise)
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \(3,\), not "):
        objective.mixed(images, labels[:2], [None] * 2, t, noise)
    with pytest.raises(ValueError, match="label 6 is outside 0"):
        objective.mixed(images, labels + 1, [None] * 2, t, noise)


def test_unequal_masks_that_do_not_fit():
    (images,), labels, t, (noise,) = batch_of([(3, 3, 8, 8)])
    for mask in (unequal(KEPT[:2]), unequal([3, 4, 5], 9)):
        with pytest.raises(ValueError, match=r"(ids_restore|cu_seqlens) must"):
            objective_of(network())(images, labels, mask, t, noise)
    with pytest.raises(ValueError, match=r"without a decoder \(decoder_depth=0\) cannot fill in dropped patches"):
        objective_of(network(decoder_depth=0))(images, labels, unequal(KEPT), t, noise)
