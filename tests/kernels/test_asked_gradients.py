"""Backward computes the gradients that are asked for and keeps what these read: every op, every subset of inputs."""

import itertools
from typing import NamedTuple

import pytest
import torch
from calls import CALLS, WIDTH
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import fastmask.kernels
from fastmask.kernels import backends
from fastmask.kernels.attention import _packed_bwd, packed_attention_bwd

BF16 = torch.bfloat16

# Matmuls of the ops that are not PyTorch's own.
MATMULS = {"silu_linear_fwd": 1, "silu_linear_bwd": 2, "embed_kept_patches_fwd": 1, "embed_kept_patches_bwd": 1}
MATMULS |= {"embed_kept_patches_bwd_images": 1, **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), 1)}


class Matmuls(TorchDispatchMode):
    """Counts matmuls."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += MATMULS.get(func.name().split("::")[1].split(".")[0], 0)
        return func(*args, **(kwargs or {}))


class Rule(NamedTuple):
    """What the gradients of an op need.

    Attributes:
        matmuls: those of backward, by the names of the inputs any of whose gradients needs each of them.
        kept: what backward keeps, by the names of the inputs any of whose gradients reads it.
        outputs: the inputs on which each result depends.
    """

    matmuls: tuple[str, ...]
    kept: dict[str, str]
    outputs: tuple[str, ...]


RULES = {
    "modulate_norm": Rule(
        (),
        {"x": "x scale", "stats": "x scale", "scale": "x", "cu_seqlens": "x shift scale"},
        ("x shift scale",),
    ),
    "add_gated_norm": Rule(
        (),
        dict.fromkeys(("x_new", "stats"), "x branch gate scale")
        | {"scale": "x branch gate", "branch": "gate", "gate": "branch", "cu_seqlens": "x branch gate shift scale"},
        ("x branch gate", "x branch gate shift scale"),
    ),
    "modulated_linear": Rule(
        ("x shift scale", "weight"),
        {"x": "x scale weight", "shift": "weight", "scale": "x weight", "weight": "x shift scale", "stats": "x scale"}
        | {"cu_seqlens": "x shift scale weight"},
        ("x shift scale weight bias",),
    ),
    "add_gated_linear": Rule(
        ("x branch gate shift scale", "weight"),
        {"x_new": "x branch gate scale weight", "stats": "x branch gate scale", "shift": "weight"}
        | {"scale": "x branch gate weight", "branch": "gate", "gate": "branch"}
        | {"weight": "x branch gate shift scale", "cu_seqlens": "x branch gate shift scale weight"},
        ("x branch gate", "x branch gate shift scale weight bias"),
    ),
    "gelu_linear": Rule(("x", "weight"), {"x": "x weight", "weight": "x"}, ("x weight bias",)),
    "silu_linear": Rule(("x", "weight"), {"x": "x weight", "weight": "x"}, ("x weight bias",)),
    "embed_kept_patches": Rule(
        ("images", "weight"),
        {"images": "weight", "weight": "images", "ids_keep": "images weight", "image_scale": "images weight"}
        | dict.fromkeys(("tokens", "stats"), "images weight bias scale")
        | {"scale": "images weight bias", "cu_seqlens": "images weight bias shift scale"},
        ("images weight bias", "images weight bias shift scale"),
    ),
    "restore_tokens": Rule(
        (),
        {"ids_restore": "x mask_token", "cu_seqlens": "x mask_token", "scale": "x mask_token"}
        | dict.fromkeys(("restored", "stats"), "x mask_token scale"),
        ("x mask_token", "x mask_token shift scale"),
    ),
}
LINEARS = [op for op in RULES if op.endswith("_linear")]
NATIVE_SILU = any(row.op == "silu_linear" and row.kernel == "native" for row in backends())


def leaves_of(op):
    return RULES[op].outputs[-1].split()


def any_of(names, asked):
    return bool(set(names.split()) & set(asked))


def subsets(names, few):
    """Return all subsets but the empty one; of ``few`` one, two, all but one and all of the names."""
    sizes = {1, 2, len(names) - 1, len(names)} if few else range(1, len(names) + 1)
    return [asked for size in sorted(sizes) for asked in itertools.combinations(names, size)]


def run(op, given, asked, impl, autocast=False):
    """Return the results, the gradients by name, the number of matmuls, and the bytes kept."""
    given = {name: t.clone().requires_grad_(name in asked) if is_float(t) else t for name, t in given.items()}
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with Matmuls() as matmuls:
        with (
            saved_tensors_hooks(keep, lambda t: t),
            torch.autocast("cpu", dtype=BF16, enabled=autocast),
        ):
            results = getattr(fastmask.kernels, op)(**given, impl=impl)
        results = results if isinstance(results, tuple) else (results,)
        used = [t for t in results if t.requires_grad]
        torch.autograd.backward(used, [torch.linspace(-1, 2, t.numel()).view(t.shape).to(t.dtype) for t in used])
    grads = {name: given[name].grad for name in leaves_of(op)}
    return results, grads, matmuls.count, sum(t.nbytes for t in kept.values())


def is_float(t):
    return isinstance(t, Tensor) and t.is_floating_point()


def least_kept(op, given, result, asked):
    """Return the bytes of what the gradients asked for read."""
    rows = result.flatten(0, -2).shape[0]
    bytes_of = {name: t.nbytes for name, t in given.items() if isinstance(t, Tensor)}
    bytes_of |= dict.fromkeys(("x_new", "tokens", "restored"), rows * WIDTH * 4) | {"stats": 2 * rows * 4}
    read = {name for name, readers in RULES[op].kept.items() if name in bytes_of and any_of(readers, asked)}
    if {"shift", "weight"} <= set(asked):
        read.add("stats")  # h is recomputed in the pass that sums the gradient of shift
    return sum(bytes_of[name] for name in read)


def forms(op):
    """Yield the op, the form, whether tokens are packed, and whether autocast is on."""
    yield op, "fused", False, False
    if op not in ("gelu_linear", "silu_linear"):
        yield op, "fused", True, False
    if op in LINEARS:
        yield op, "fused", False, True
        yield op, "reference", False, False
        yield op, "reference", False, True


def assert_same(op, name, grad, whole, asked, impl):
    """The same bits as with every gradient, but for sums that PyTorch adds up where the op's own kernel is not run."""
    in_another_order = name == "bias" and op == "embed_kept_patches" and "weight" not in asked
    in_another_order |= op == "silu_linear" and NATIVE_SILU and impl == "fused" and not {"x", "weight"} <= set(asked)
    if in_another_order:
        torch.testing.assert_close(grad, whole, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(grad, whole), (name, asked)


@pytest.mark.parametrize(("op", "impl", "packed", "autocast"), [form for op in RULES for form in forms(op)])
def test_every_subset(op, impl, packed, autocast):
    given, rule = CALLS[op](packed), RULES[op]
    _, whole, *_ = run(op, given, leaves_of(op), impl, autocast)
    for asked in subsets(leaves_of(op), few=packed or autocast):
        results, grads, matmuls, kept = run(op, given, asked, impl, autocast)
        assert matmuls == bool(rule.matmuls) + sum(any_of(names, asked) for names in rule.matmuls), asked
        assert [t.requires_grad for t in results] == [any_of(names, asked) for names in rule.outputs], asked
        for name, grad in grads.items():
            if name in asked:
                assert_same(op, name, grad, whole[name], asked, impl)
            else:
                assert grad is None, (name, asked)
        if impl == "fused" and not autocast and (op != "silu_linear" or NATIVE_SILU):
            assert kept == least_kept(op, given, results[0], asked), asked


@pytest.mark.parametrize("asked", subsets("qkv", few=False))
def test_packed_attention(asked):
    """Five matmuls of a sample give all three gradients; that of v needs two of them, and no v."""
    given = {name: t.requires_grad_(name in asked) for name, t in CALLS["attention"](True).items()}
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = fastmask.kernels.attention(**given, impl="reference")
    grad = torch.randn_like(out)
    out.backward(grad)
    tensors = [t.detach() for t in given.values()]
    whole = packed_attention_bwd(grad, *tensors, [True] * 3)
    for name, right in zip("qkv", whole, strict=True):
        assert given[name].grad is None if name not in asked else torch.equal(given[name].grad, right)
    own = any_of("q k", asked)
    assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in tensors) - (0 if own else tensors[2].nbytes)
    with Matmuls() as matmuls:
        _packed_bwd(grad, *tensors, [name in asked for name in "qkv"])
    assert matmuls.count == 3 * (1 + own + len(asked))  # three samples


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("op", "asked"),
    [
        ("modulate_norm", "shift"),
        ("modulate_norm", "x"),
        ("add_gated_norm", "shift scale"),
        ("add_gated_norm", "branch"),
        ("modulated_linear", "x"),
        ("modulated_linear", "weight"),
        ("modulated_linear", "bias"),
        ("add_gated_linear", "x branch gate shift scale"),
        ("add_gated_linear", "branch"),
        ("add_gated_linear", "weight bias"),
        ("gelu_linear", "x"),
        ("gelu_linear", "weight"),
        ("silu_linear", "weight bias"),
        ("embed_kept_patches", "shift scale"),
        ("embed_kept_patches", "bias"),
        ("restore_tokens", "scale"),
    ],
)
def test_a_subset_in_one_graph(op, asked, dynamic):
    torch._dynamo.reset()
    asked, given = asked.split(), CALLS[op](False)
    function = getattr(fastmask.kernels, op)
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    found = []
    for run_op in (function, compiled):
        leaves = {name: t.clone().requires_grad_(name in asked) if is_float(t) else t for name, t in given.items()}
        results = run_op(**leaves, impl="fused")
        results = results if isinstance(results, tuple) else (results,)
        assert [t.requires_grad for t in results] == [any_of(names, asked) for names in RULES[op].outputs]
        sum(t.sin().sum() for t in results if t.requires_grad).backward()
        found.append([leaves[name].grad for name in leaves_of(op)])
    for actual, expected in zip(*found, strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_a_frozen_weight_costs_two_matmuls_of_forward(impl):
    """What a frozen backbone's block is told by: 2.0 and not 3.0 matmuls, as PyTorch's own Linear."""
    for op in LINEARS:
        given = CALLS[op](False)
        trained = [name for name in leaves_of(op) if name not in ("weight", "bias")]
        assert [run(op, given, names, impl)[2] for names in (trained, leaves_of(op))] == [2, 3]
