"""Position tables as published networks hold them, (1, L, D), beside (L, D): for embedding and for restoring."""

import pytest
import torch
from calls import CALLS

from fastmask.kernels import embed_kept_patches, restore_tokens
from fastmask.kernels.embed_kept_patches import embed_kept_patches_reference
from fastmask.kernels.restore_tokens import restore_tokens_reference

OPS = {"embed_kept_patches": embed_kept_patches, "restore_tokens": restore_tokens}
REFERENCES = {"embed_kept_patches": embed_kept_patches_reference, "restore_tokens": restore_tokens_reference}


def results(op, arguments, leaves=()):
    """Return an op's results, then the gradients of the leaves."""
    tracked = {name: arguments[name].detach().clone().requires_grad_() for name in leaves}
    out = op(**arguments | tracked)
    out = out if isinstance(out, tuple) else (out,)
    total = sum((o * torch.arange(o.numel()).view(o.shape).sin()).sum() for o in out)
    return [*out, *torch.autograd.grad(total, list(tracked.values()))] if leaves else list(out)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_a_table_with_a_first_dimension_of_one(op, impl, packed, normed):
    arguments = CALLS[op](packed) | {"impl": impl} | ({} if normed else {"shift": None, "scale": None})
    leaves = ["weight", "images"] if op == "embed_kept_patches" else ["x", "mask_token"]
    expected = results(OPS[op], arguments, leaves)
    other = results(OPS[op], arguments | {"position": arguments["position"][None]}, leaves)
    assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_its_gradient_has_its_shape(op, packed):
    """By default, too: a CPU takes the reference where the fused form lacks a gradient that is asked for."""
    arguments = CALLS[op](packed)
    expected = results(REFERENCES[op], arguments, ["position"])
    for function, form in ((REFERENCES[op], {}), (OPS[op], {"impl": "reference"}), (OPS[op], {"impl": None})):
        other = results(function, arguments | form | {"position": arguments["position"][None]}, ["position"])
        assert other[-1].shape == (1, *arguments["position"].shape)
        assert all(torch.equal(a, b) for a, b in zip(other, [*expected[:-1], expected[-1][None]], strict=True))


@pytest.mark.parametrize("op", OPS)
def test_the_fused_forms_name_the_shape_that_they_were_given(op):
    arguments = CALLS[op](False)
    table = arguments["position"][None].requires_grad_()
    with pytest.raises(ValueError, match=r"position of shape \(1, 4, 8\) must not require a gradient"):
        OPS[op](**arguments | {"position": table, "impl": "fused"})


@pytest.mark.parametrize("op", OPS)
def test_it_compiles_into_one_graph(op):
    torch._dynamo.reset()
    arguments = CALLS[op](False) | {"impl": "fused"}
    compiled = torch.compile(OPS[op], fullgraph=True, backend="aot_eager")
    other = results(compiled, arguments | {"position": arguments["position"][None]})
    assert all(torch.equal(a, b) for a, b in zip(other, results(OPS[op], arguments), strict=True))
