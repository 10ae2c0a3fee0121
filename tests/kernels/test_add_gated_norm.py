import pytest
import torch
from torch.library import opcheck
from util import BF16_ROUNDING

from fastmask.kernels import add_gated_norm, modulate_norm
from fastmask.kernels.add_gated_norm import add_gated_norm_bwd, add_gated_norm_fwd
from fastmask.testing import assert_near

BF16 = torch.bfloat16

STEPS = 2  # the gated addition and the norm
SHAPES = [(3, 5, 7), (2, 1, 60), (1, 255, 12), (2, 3, 1152)]


def exact_result(x, branch, gate, shift, scale, eps=1e-6):
    """Both results in float64, with the norm spelled as a standardisation."""
    x, branch, gate, shift, scale = (t.double() for t in (x, branch, gate, shift, scale))
    gate, shift, scale = (t if t.ndim == 3 else t.unsqueeze(1).expand_as(x) for t in (gate, shift, scale))
    x = x + torch.einsum("bkd,bkd->bkd", gate, branch)
    deviation = torch.sqrt(x.var(-1, correction=0, keepdim=True) + eps)
    return x, (x - x.mean(-1, keepdim=True)) / deviation * scale + (x - x.mean(-1, keepdim=True)) / deviation + shift


def arguments(batch, tokens, width, per_token, dtype=torch.float32):
    modulation = (batch, tokens, width) if per_token else (batch, width)
    shapes = [(batch, tokens, width)] * 2 + [modulation] * 3
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_and_fp64(shape, per_token):
    inputs = arguments(*shape, per_token)
    exact = exact_result(*inputs)
    for out, expected in zip(add_gated_norm(*inputs), exact, strict=True):
        assert out.dtype == torch.float32
        assert_near(out, expected, STEPS)
    for out, expected in zip(add_gated_norm(*(t.double() for t in inputs)), exact, strict=True):
        assert_near(out, expected, STEPS)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_results_are_rounded_once_each(shape, per_token):
    inputs = arguments(*shape, per_token, torch.bfloat16)
    x, h = add_gated_norm(*inputs)
    assert x.dtype == h.dtype == torch.bfloat16
    exact_x, _ = exact_result(*inputs)
    assert ((x.double() - exact_x).abs() <= BF16_ROUNDING * exact_x.abs() + 1e-6).all()
    # The norm is that of the residual returned, which is the one that the next block sees.
    _, exact_h = exact_result(x, torch.zeros_like(x), *inputs[2:])
    assert ((h.double() - exact_h).abs() <= BF16_ROUNDING * exact_h.abs() + 2e-5).all()


def test_gate_and_norm_may_be_modulated_differently():
    x, branch, _, shift, scale = arguments(2, 3, 5, True)
    gate = torch.randn(2, 5)
    for out, expected in zip(
        add_gated_norm(x, branch, gate, shift, scale), exact_result(x, branch, gate, shift, scale), strict=True
    ):
        assert_near(out, expected, STEPS)


def test_eps_reaches_the_norm():
    inputs = [t.double() * 1e-2 for t in arguments(2, 3, 5, False)]
    for out, expected in zip(add_gated_norm(*inputs, eps=1e-2), exact_result(*inputs, eps=1e-2), strict=True):
        assert_near(out, expected, STEPS)


def test_a_closed_gate_leaves_the_residual_alone():
    x, branch, gate, shift, scale = arguments(2, 3, 5, False)
    residual, h = add_gated_norm(x, branch, torch.zeros_like(gate), shift, scale)
    assert torch.equal(residual, x)
    assert torch.equal(h, modulate_norm(x, shift, scale))


def test_inputs_are_not_written():
    inputs = arguments(2, 3, 5, False)
    before = [t.clone() for t in inputs]
    add_gated_norm(*inputs)
    assert all(torch.equal(t, old) for t, old in zip(inputs, before, strict=True))


def test_non_contiguous_input():
    inputs = [torch.randn(3, 7, 5).mT, torch.randn(5, 3, 7).transpose(0, 1), *(torch.randn(7, 3).mT for _ in range(3))]
    expected = add_gated_norm(*(t.contiguous() for t in inputs))
    for out, same in zip(add_gated_norm(*inputs), expected, strict=True):
        torch.testing.assert_close(out, same, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("per_token", [False, True])
def test_gradcheck(per_token):
    inputs = [t.double().requires_grad_() for t in arguments(2, 2, 3, per_token)]
    assert torch.autograd.gradcheck(add_gated_norm, inputs)


@pytest.mark.parametrize("name", ["gate", "shift", "scale"])
@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (3, 1, 5), (1, 4), (4,)])
def test_a_modulation_that_fits_neither_form(name, shape):
    fitting = dict(zip(("x", "branch", "gate", "shift", "scale"), arguments(2, 3, 5, False), strict=True))
    with pytest.raises(ValueError, match=rf"{name} must have shape \(2, 5\) or \(2, 3, 5\) for x of shape"):
        add_gated_norm(**{**fitting, name: torch.zeros(shape)})


@pytest.mark.parametrize("shape", [(2, 3, 1), (1, 3, 5), (2, 5)])
def test_a_branch_of_another_shape(shape):
    x, _, *modulation = arguments(2, 3, 5, False)
    with pytest.raises(ValueError, match=r"branch must have the shape of x, \(2, 3, 5\), not "):
        add_gated_norm(x, torch.zeros(shape), *modulation)


def test_tokens_of_another_rank():
    with pytest.raises(ValueError, match=r"x must have shape \(B, K, D\), or \(N, D\) with cu_seqlens, not \(2, 5\)"):
        add_gated_norm(*(torch.zeros(2, 5) for _ in range(5)))


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 1, 4], dtype=torch.int32)])
def test_opcheck(cu_seqlens, rms):
    x, branch, grad = torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 8).to(BF16)
    modulations = [torch.randn(2, 8) for _ in range(3)]
    opcheck(add_gated_norm_fwd, (x, branch, *modulations, cu_seqlens, rms, 1e-6, BF16))
    stats = torch.rand(2, 4) + 0.5
    for grad_new, recompute in ((None, False), (x, True)):
        opcheck(add_gated_norm_bwd, (grad_new, grad, x, stats, branch, *modulations, cu_seqlens, rms, recompute))


def test_the_input_residual_is_not_kept():
    tensors = [t.requires_grad_() for t in arguments(2, 3, 8, False)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        x_new, _ = add_gated_norm(*tensors, impl="fused")
    assert tensors[0].data_ptr() not in kept
    assert x_new.data_ptr() in kept
