import checks
import pytest
import torch
from torch.library import opcheck
from util import BF16_ROUNDING

from fastmask.kernels import modulate_norm
from fastmask.kernels.modulate_norm import modulate_norm_bwd, modulate_norm_fwd
from fastmask.testing import assert_near

BF16 = torch.bfloat16

# Odd sizes, one token, one sample, a width that fits no vector, a published width.
SHAPES = [(3, 5, 7), (2, 1, 60), (1, 255, 12), (2, 3, 1152)]


def modulated_by_loops(x, shift, scale, eps=1e-6):
    """Token by token in float64."""
    x, shift, scale = x.double(), shift.double(), scale.double()
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        for k in range(x.shape[1]):
            centred = x[b, k] - x[b, k].sum() / x.shape[2]
            variance = (centred * centred).sum() / x.shape[2]
            at = (b, k) if shift.ndim == 3 else (b,)
            out[b, k] = centred / torch.sqrt(variance + eps) * (1 + scale[at]) + shift[at]
    return out


def arguments(batch, tokens, width, per_token, dtype=torch.float32):
    modulation = (batch, tokens, width) if per_token else (batch, width)
    x = torch.randn(batch, tokens, width) * 3 + 1
    return [t.to(dtype) for t in (x, torch.randn(modulation), torch.randn(modulation))]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_and_fp64(shape, per_token):
    x, shift, scale = arguments(*shape, per_token)
    exact = modulated_by_loops(x, shift, scale)
    out = modulate_norm(x, shift, scale)
    assert out.dtype == torch.float32
    assert_near(out, exact)
    assert_near(modulate_norm(x.double(), shift.double(), scale.double()), exact)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_rounded_once(shape, per_token):
    x, shift, scale = arguments(*shape, per_token, torch.bfloat16)
    out = modulate_norm(x, shift, scale)
    assert out.dtype == torch.bfloat16
    exact = modulated_by_loops(x, shift, scale)
    # One rounding of the result, on top of fp32's own error, which the cancelling of shift leaves absolute.
    assert ((out.double() - exact).abs() <= BF16_ROUNDING * exact.abs() + 2e-5).all()


def test_bf16_tokens_with_an_fp32_modulation():
    x, shift, scale = arguments(3, 5, 7, False)
    out = modulate_norm(x.bfloat16(), shift, scale)
    assert out.dtype == torch.bfloat16
    exact = modulated_by_loops(x.bfloat16(), shift, scale)
    assert ((out.double() - exact).abs() <= BF16_ROUNDING * exact.abs() + 2e-5).all()


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_eps_is_added_to_the_variance(eps):
    x, shift, scale = (t.double() for t in arguments(2, 3, 5, False))
    x = x * 1e-2
    assert_near(modulate_norm(x, shift, scale, eps=eps), modulated_by_loops(x, shift, scale, eps))


def test_a_constant_token_becomes_the_shift():
    _, shift, scale = arguments(2, 3, 8, True)
    assert torch.equal(modulate_norm(torch.full((2, 3, 8), 5.0), shift, scale), shift)


def test_non_contiguous_input():
    x, shift, scale = torch.randn(3, 7, 5).mT, torch.randn(7, 3).mT, torch.randn(3, 14)[:, ::2]
    torch.testing.assert_close(
        modulate_norm(x, shift, scale), modulated_by_loops(x, shift, scale).float(), rtol=1e-6, atol=2e-6
    )


@pytest.mark.parametrize("per_token", [False, True])
def test_gradcheck(per_token):
    inputs = [t.double().requires_grad_() for t in arguments(2, 2, 3, per_token)]
    assert torch.autograd.gradcheck(modulate_norm, inputs)


@pytest.mark.parametrize("name", ["shift", "scale"])
@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (3, 1, 5), (1, 4), (1,), (2, 3, 1), (1, 3, 5)])
def test_a_modulation_that_fits_neither_form(name, shape):
    fitting = {"x": torch.zeros(2, 3, 5), "shift": torch.zeros(2, 5), "scale": torch.zeros(2, 5)}
    with pytest.raises(ValueError, match=rf"{name} must have shape \(2, 5\) or \(2, 3, 5\) for x of shape"):
        modulate_norm(**{**fitting, name: torch.zeros(shape)})


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 5, 1)])
def test_tokens_of_another_rank(shape):
    with pytest.raises(ValueError, match=r"x must have shape \(B, K, D\), or \(N, D\) with cu_seqlens, not "):
        modulate_norm(torch.zeros(shape), torch.zeros(2, 5), torch.zeros(2, 5))


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 1, 4], dtype=torch.int32)])
def test_opcheck(cu_seqlens, rms):
    x, grad, shift, scale = torch.randn(4, 8), torch.randn(4, 8).to(BF16), torch.randn(2, 8), torch.randn(2, 8)
    opcheck(modulate_norm_fwd, (x, shift, scale, cu_seqlens, rms, 1e-6, BF16))
    stats = torch.rand(2, 4) + 0.5
    for recompute in (False, True):
        opcheck(modulate_norm_bwd, (grad, x, stats, shift, scale, cu_seqlens, rms, recompute))


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_as_many_packed_tokens_as_samples(impl):
    x, shift, scale = torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 8)
    h = modulate_norm(x, shift, scale, cu_seqlens=torch.tensor([0, 2, 2, 3]), impl=impl)
    sample = torch.tensor([0, 0, 2])  # the modulations are per sample: tokens 0 and 1 are of the first one
    torch.testing.assert_close(h[None], modulate_norm(x[None], shift[None, sample], scale[None, sample], impl=impl))


def test_two_calls_in_one_dynamic_graph():
    def twice(x, shift, scale, impl):
        return modulate_norm(modulate_norm(x, shift, scale, impl=impl), shift, scale, impl=impl)

    checks.check_compiles(twice, arguments(2, 3, 16, False), dynamic=True)
