"""The default of `embed_kept_patches` on a CPU, and what its native kernel refuses."""

import sys

import checks
import pytest
import torch
from test_embed_kept_patches import KERNEL_SHAPES, MANY_TOKENS, embed_and_norm, embed_only, kernel_arguments

from fastmask.kernels import backends

NATIVE = any(row[:3] == ("embed_kept_patches", "cpu", "native") for row in backends())


@pytest.mark.skipif(not NATIVE, reason="no native kernel here")
def test_a_native_kernel_is_the_default(monkeypatch):
    tensors, others = kernel_arguments(*KERNEL_SHAPES[0])
    expected = checks.results(embed_and_norm, tensors, **others, impl="fused")
    monkeypatch.setattr(sys.modules["fastmask.kernels.embed_kept_patches"], "embed_kept_patches_reference", None)
    assert all(map(torch.equal, checks.results(embed_and_norm, tensors, **others), expected))


@pytest.mark.parametrize("name", ["position", "image_scale"])
def test_the_default_on_a_cpu_has_every_gradient(name):
    tensors, others = kernel_arguments(*KERNEL_SHAPES[0])
    others[name].requires_grad_()
    grad, expected = (
        torch.autograd.grad(embed_and_norm(*tensors, **others, impl=impl)[1].sum(), others[name])[0]
        for impl in (None, "reference")
    )
    assert torch.equal(grad, expected)


@pytest.mark.parametrize(("op", "shape"), [(embed_and_norm, (2, 3, 5, 5, 2, 136, 20)), (embed_only, MANY_TOKENS)])
def test_the_number_of_threads_changes_no_bit(op, shape):
    tensors, others = kernel_arguments(*shape)
    tensors = tensors[:3] if op is embed_only else tensors
    expected = checks.results(op, tensors, **others, impl="fused")
    torch.set_num_threads(2)
    try:
        actual = checks.results(op, tensors, **others, impl="fused")
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.skipif(not NATIVE, reason="no native kernel here")
@pytest.mark.parametrize("index", [6, -1])
def test_native_kernels_refuse_positions_that_are_none(index):
    (images, weight, bias, *_), others = kernel_arguments(3, 3, 3, 2, 2, 8, 4)
    others["ids_keep"][1, 2] = index
    with pytest.raises(RuntimeError, match=rf"ids_keep holds {index}, which is outside 0 .. 5"):
        embed_only(images, weight, bias, **others, impl="fused")
