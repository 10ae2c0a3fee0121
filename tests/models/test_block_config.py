"""The options of blocks: beside a plain block in float64, on all, kept and packed tokens, and on every network."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from routes import inputs, routed
from torch._dynamo.testing import CompileCounterWithBackend
from util import small_net

from fastmask import Mask
from fastmask.diffusion.masking import structured_mask
from fastmask.kernels import sample_mask
from fastmask.models.block_config import BlockConfig
from fastmask.models.deferred import DeferredConfig
from fastmask.models.layers import Block, ModulatedLinear
from fastmask.models.networks import NETWORKS
from fastmask.models.sprint import SprintConfig
from fastmask.models.stack import Stack, all_blocks, run_stack
from fastmask.models.tread import TreadConfig
from fastmask.testing import assert_near, assert_network_accurate, network_steps

WIDTH, HEADS, OUT, CONDITION, BLOCKS = 32, 2, 8, 24, 2
OPTIONS = {
    "default": {},
    "qk_norm": {"qk_norm": True},
    "norm": {"norm": "rms"},
    "mlp": {"mlp": "swiglu"},
    "rope": {"rope": True},
    "all": {"qk_norm": True, "norm": "rms", "mlp": "swiglu", "rope": True},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
ROWS, COLUMNS = 3, 5


def stack_of(options):
    """A stack in which no weight is zero."""
    config = BlockConfig(**options)
    modules = torch.nn.ModuleList(Block(WIDTH, HEADS, CONDITION, config) for _ in range(BLOCKS))
    end = ModulatedLinear(WIDTH, OUT, CONDITION, config)
    with torch.no_grad():
        for parameter in (*modules.parameters(), *end.parameters()):
            parameter.normal_(std=(parameter[0].numel() if parameter.ndim > 1 else 10) ** -0.5)
    return Stack(modules, end, "kept")


def plain_stack(w, options, tokens, condition, positions):
    """The paper's formulas, sample by sample, in the dtype of its arguments.

    Args:
        w: the weights by name.
        options: as of `BlockConfig`.
        tokens: shape (K, D).
        condition: shape (condition width,).
        positions: row and column of each token.
    """

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def normed(x, shift, scale):
        centred = x if options.get("norm") == "rms" else x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    def turned(x):  # (K, head width), by complex numbers
        n = x.shape[1] // 4
        f = 10000.0 ** (-torch.arange(n, dtype=torch.float64) / n)
        rows, columns = torch.tensor(positions, dtype=torch.float64).unbind(1)
        angles = torch.cat([rows[:, None] * f, columns[:, None] * f], 1)
        z = torch.complex(x[:, : 2 * n], x[:, 2 * n :]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([z.real, z.imag], 1)

    def attention(name, x):
        heads = []
        for q, k, v in zip(*(part.split(WIDTH // HEADS, 1) for part in x.split(WIDTH, 1)), strict=True):
            if options.get("qk_norm"):
                q, k = (
                    w[f"{name}.{which}.weight"] * part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt()
                    for which, part in (("q_norm", q), ("k_norm", k))
                )
            if options.get("rope"):
                q, k = turned(q), turned(k)
            heads.append((q @ k.T / math.sqrt(q.shape[1])).softmax(-1) @ v)
        return linear(f"{name}.proj", torch.cat(heads, 1))

    def mlp(name, hidden):
        if options.get("mlp") == "swiglu":
            gate, value = hidden.chunk(2, -1)
            return linear(f"{name}.fc2", gate * torch.sigmoid(gate) * value)
        return linear(f"{name}.fc2", F.gelu(hidden, approximate="tanh"))

    x, c = tokens, F.silu(condition)
    for i in range(BLOCKS):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{i}.adaLN_modulation.1", c).chunk(6)
        x = x + gate1 * attention(f"{i}.attn", linear(f"{i}.attn.qkv", normed(x, shift1, scale1)))
        x = x + gate2 * mlp(f"{i}.mlp", linear(f"{i}.mlp.fc1", normed(x, shift2, scale2)))
    shift, scale = linear("end.adaLN_modulation.1", c).chunk(2)
    return linear("end.linear", normed(x, shift, scale))


def parameters_of(stack):
    named = dict(stack.blocks.named_parameters())
    return named | {f"end.{name}": parameter for name, parameter in stack.exit.named_parameters()}


def kept_ids(kind, batch=3):
    """A mask of positions and the kept ids of each sample; None is all."""
    length = ROWS * COLUMNS
    if kind == "all":
        return None, [torch.arange(length)] * batch
    if kind == "kept":
        mask = sample_mask(batch, length, 6, seed=1, device="cpu")
        return mask, list(mask.ids_keep.long())
    counts = [1, 15, 4]
    mask = sample_mask(batch, length, torch.tensor(counts), seed=1, device="cpu", total=sum(counts))
    return mask, [ids.long() for ids in mask.ids_keep.split(counts)]


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("kind", ["all", "kept", "packed"])
@each_option
def test_a_stack_is_the_plain_one(options, kind, impl):
    stack, (mask, ids) = stack_of(options), kept_ids(kind)
    tokens = [torch.randn(len(each), WIDTH) for each in ids]
    condition = torch.randn(len(ids), CONDITION)
    w = {name: p.detach().double().requires_grad_() for name, p in parameters_of(stack).items()}
    exact = torch.cat(
        [
            plain_stack(w, options, x.double(), c.double(), [divmod(int(i), COLUMNS) for i in each])
            for x, c, each in zip(tokens, condition, ids, strict=True)
        ]
    )
    part = torch.cat(tokens) if kind == "packed" else torch.stack(tokens)
    (out,) = run_stack(stack, [part], [mask], condition, impl, False, [(ROWS, COLUMNS)])
    assert_near(out.flatten(0, -2), exact, network_steps(BLOCKS))
    probe = torch.randn_like(exact)
    out.flatten(0, -2).backward(probe.float())
    exact.backward(probe)
    gradients = {name: p.grad for name, p in parameters_of(stack).items()}
    assert_network_accurate(gradients, {name: p.grad for name, p in w.items()}, network_steps(BLOCKS, backward=True))


def test_all_tokens_in_another_order_give_outputs_in_that_order():
    """Rotations go with the tokens: the order of the kept ones does not matter, dense or packed."""
    stack, length = stack_of(OPTIONS["all"]), ROWS * COLUMNS
    x, condition = torch.randn(2, length, WIDTH, dtype=torch.float64), torch.randn(2, CONDITION, dtype=torch.float64)
    stack.blocks.double(), stack.exit.double()
    order = torch.stack([torch.randperm(length) for _ in range(2)])
    shuffled = x.gather(1, order[..., None].expand_as(x))
    ends = condition, "reference", False, [(ROWS, COLUMNS)]
    (whole,) = run_stack(stack, [x], [None], *ends)
    expected = whole.gather(1, order[..., None].expand_as(whole))
    (dense,) = run_stack(stack, [shuffled], [Mask(order.int(), order.argsort(1).int())], *ends)
    assert_near(dense, expected, network_steps(BLOCKS))
    rows = torch.tensor([0, length, 2 * length], dtype=torch.int32)
    packed_mask = Mask(order.flatten().int(), order.argsort(1).int(), rows)
    (packed,) = run_stack(stack, [shuffled.flatten(0, 1)], [packed_mask], *ends)
    assert_near(packed, expected.flatten(0, 1), network_steps(BLOCKS))
    (unaware,) = run_stack(stack, [shuffled], [None], *ends)  # the positions of the old order
    assert not torch.allclose(unaware, expected, atol=1e-2)


def test_rotations_leave_no_trace_where_they_are_off():
    """Not a single operator more: neither a table nor a gather."""
    names = {}
    for rope in (False, True):
        stack = stack_of({"rope": rope})
        with torch.profiler.profile() as profile, torch.no_grad():
            run_stack(stack, [torch.randn(2, 15, WIDTH)], [None], torch.randn(2, CONDITION), None, False, [(3, 5)])
        names[rope] = {event.name for event in profile.events()}
    assert {"aten::cos", "aten::sin"} <= names[True]
    assert not {"aten::cos", "aten::sin", "aten::embedding", "aten::arange"} & names[False]


# On every network

SMALL = {
    "maskdit": lambda options: (
        small_net(width=16, depth=1, decoder_width=16, decoder_depth=1, decoder_num_heads=2, **options).model
    ),
    "tread": lambda options: routed(TreadConfig(width=16, depth=3, route_end=2, num_heads=2, **options)),
    "sprint": lambda options: routed(SprintConfig(width=16, depth=3, route_end=2, num_heads=2, **options)),
    "deferred": lambda options: routed(DeferredConfig(width=16, depth=2, mixer_width=16, mixer_depth=1, **options)),
}
assert SMALL.keys() == NETWORKS.keys()


def masks_of(length, batch=3):
    counts = [1, length, 5]
    return {
        "none": None,
        "random": sample_mask(batch, length, 5, seed=0, device="cpu"),
        "structured": structured_mask(batch, math.isqrt(length), seed=0, offset=0, device=torch.device("cpu")),
        "packed": sample_mask(batch, length, torch.tensor(counts), seed=0, device="cpu", total=sum(counts)),
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_the_options(name):
    config = NETWORKS[name](**OPTIONS["all"])
    assert config.options() == dataclasses.asdict(BlockConfig(**OPTIONS["all"]))
    assert NETWORKS[name]().options() == dataclasses.asdict(BlockConfig())
    for chosen, present in ((config, True), (NETWORKS[name](), False)):
        model = chosen.build(1, 8, 10)
        blocks = list(all_blocks(model.stacks))
        assert {hasattr(block.attn, "q_norm") for block in blocks} == {present}
        assert {block.mlp.gated for block in blocks} == {present}
        norms = [block.options.norm for block in blocks] + [s.exit.norm for s in model.stacks if s.exit is not None]
        assert {*norms} == {"rms" if present else "layer"}
        assert {stack.options.rope for stack in model.stacks} == {present}


@pytest.mark.once
@pytest.mark.parametrize("option", ["norm", "mlp", "rope"])
@pytest.mark.parametrize("name", NETWORKS)
def test_one_graph_forward_and_backward(name, option):
    """The same as in eager mode, recomputed blocks included, whose results are the same bits."""
    torch._dynamo.reset()
    model = SMALL[name](OPTIONS[option])
    x, c_noise, labels = inputs(model)
    mask, probe = masks_of(model.length)["random"], None

    def results(run):
        nonlocal probe
        model.zero_grad()
        raw = run(x, c_noise, labels, mask)
        probe = torch.randn_like(raw) if probe is None else probe
        raw.backward(probe)
        return {"raw": raw.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}

    eager, counter = results(model), CompileCounterWithBackend("aot_eager")
    compiled = results(torch.compile(model, backend=counter, fullgraph=True))
    assert counter.frame_count == 1
    model.checkpoint_blocks = True
    again = results(model)
    assert eager.keys() == compiled.keys() == again.keys()
    for key, value in eager.items():
        assert torch.equal(again[key], value), key
        assert_near(compiled[key], value, 2 * network_steps(4, backward=True), name=key)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["none", "random", "structured", "packed"])
@pytest.mark.parametrize("name", NETWORKS)
def test_options_change_what_is_computed(name, kind):
    """And nothing but finite numbers, whatever the mask; two passes are the same bits."""
    found = {}
    for option in OPTIONS:
        torch.manual_seed(0)
        model = SMALL[name](OPTIONS[option])
        x, c_noise, labels = inputs(model)
        mask = masks_of(model.length)[kind]
        raw = model(x, c_noise, labels, mask)
        assert raw.isfinite().all()
        assert torch.equal(model(x, c_noise, labels, mask), raw)
        found[option] = raw.detach()
    for one, other in itertools.combinations(found, 2):
        assert not torch.allclose(found[one], found[other], atol=1e-3), (one, other)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "batch"}, "norm must be layer or rms, not 'batch'"),
        ({"mlp": "relu"}, "mlp must be gelu or swiglu, not 'relu'"),
        ({"rope": True, "width": 12, "num_heads": 2}, "so width / num_heads must be a multiple of 4, not 6"),
    ],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_options_that_cannot_be(name, fields, message):
    with pytest.raises(ValueError, match=message):
        NETWORKS[name](**fields).check(8)
    if name == "maskdit" and "rope" in fields:
        with pytest.raises(ValueError, match="so decoder_width / decoder_num_heads must be a multiple of 4, not 6"):
            NETWORKS[name](rope=True, decoder_width=12).check(8)
        NETWORKS[name](rope=True, decoder_width=12, decoder_depth=0).check(8)
