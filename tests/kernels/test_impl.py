"""Every public op takes `impl=`, and what it is for."""

import inspect

import pytest
import torch
from calls import CALLS
from torch.utils import _pytree as pytree

from fastmask import kernels
from fastmask.kernels import attention, backends

PLAIN = {"patchify", "unpatchify", "random_normal", "random_uniform"}  # layouts and random numbers, as the docs say
PUBLIC = sorted({row.op for row in backends()})  # of which test_dispatch.py knows that it is all of `__all__`


def called(op, packed, impl):
    """Return what an op computes of its example: its results, or the tensors that it updates."""
    torch.manual_seed(0)
    arguments = CALLS[op](packed)
    results = getattr(kernels, op)(**arguments, impl=impl)
    return [t for t in pytree.tree_leaves(arguments if op == "adamw_ema" else results) if isinstance(t, torch.Tensor)]


def test_every_op_has_an_example():
    assert sorted(CALLS) == PUBLIC


@pytest.mark.parametrize("op", PUBLIC)
def test_the_argument_is_there_and_described(op):
    function = getattr(kernels, op)
    parameter = inspect.signature(function).parameters.get("impl")
    if op in PLAIN:
        assert parameter is None
        return
    assert parameter is not None
    assert (parameter.kind, parameter.default) == (parameter.KEYWORD_ONLY, None)
    assert "\n        impl: " in function.__doc__


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("op", [op for op in PUBLIC if op not in PLAIN])
def test_both_forms_run_and_agree(op, packed):
    reference = called(op, packed, "reference")
    for impl in ("fused", None):
        results = called(op, packed, impl)
        assert len(results) == len(reference) > 0
        for actual, expected in zip(results, reference, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", [op for op in PUBLIC if op not in PLAIN])
def test_another_form_is_refused(op):
    with pytest.raises(ValueError, match='impl must be "fused", "reference" or None, not \'eager\''):
        called(op, False, "eager")


def test_attention_by_a_library_is_no_reference():
    arguments = CALLS["attention"](False)
    for impl, backend in (("reference", "torch"), ("fused", "reference")):
        with pytest.raises(ValueError, match=f'impl="{impl}" and backend="{backend}" contradict each other'):
            attention(**arguments, impl=impl, backend=backend)
    assert torch.equal(attention(**arguments, impl="fused", backend="torch"), attention(**arguments, backend="torch"))
