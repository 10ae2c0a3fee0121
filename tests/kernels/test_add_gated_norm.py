import itertools

import checks
import pytest
import torch
from torch.library import opcheck
from util import BF16_ROUNDING, relative_error

from fastmask.kernels import add_gated_norm, modulate_norm
from fastmask.kernels.add_gated_norm import add_gated_norm_bwd, add_gated_norm_fwd

OP, TOKENS, MODULATIONS = add_gated_norm, 2, 3
BF16, F32 = torch.bfloat16, torch.float32

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
        assert relative_error(out, expected) < 5e-7
    for out, expected in zip(add_gated_norm(*(t.double() for t in inputs)), exact, strict=True):
        assert relative_error(out, expected) < 1e-14


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
        assert relative_error(out, expected) < 5e-7


def test_eps_reaches_the_norm():
    inputs = [t.double() * 1e-2 for t in arguments(2, 3, 5, False)]
    for out, expected in zip(add_gated_norm(*inputs, eps=1e-2), exact_result(*inputs, eps=1e-2), strict=True):
        assert relative_error(out, expected) < 1e-14


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
@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (2, 1, 5), (5,)])
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


# The kernels


def DTYPES(x, branch, modulation):
    return x, branch, modulation, modulation, modulation


WIDTHS = [8, 56, 1152]


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_kernel_accuracy(width, per_token, norm):
    checks.check_accuracy(OP, arguments(2, 3, width, per_token), norm=norm, eps=1e-5)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 35), (1, 64)])
def test_kernel_accuracy_where_several_programs_share_a_sample(batch, tokens):
    checks.check_accuracy(OP, arguments(batch, tokens, 16, False))


@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (F32, BF16, F32), (F32, BF16, BF16), (BF16, F32, F32)], ids=str)
def test_kernel_accuracy_of_mixed_dtypes(dtypes):
    tensors = arguments(2, 40, 64, False)
    checks.check_accuracy(OP, [t.to(dtype) for t, dtype in zip(tensors, DTYPES(*dtypes), strict=True)])


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_packed_samples(norm):
    cu_seqlens = torch.tensor([0, 7, 7, 8, 11], dtype=torch.int32)
    tokens, modulations = arguments(1, 11, 24, False)[:TOKENS], [torch.randn(4, 24) for _ in range(MODULATIONS)]
    tokens = [t[0] for t in tokens]
    checks.check_accuracy(OP, [*tokens, *modulations], cu_seqlens=cu_seqlens, norm=norm)
    # Each sample alone gives the same; the gradients of an empty sample's modulations are zero.
    packed = checks.results(OP, [*tokens, *modulations], cu_seqlens=cu_seqlens, norm=norm, impl="fused")
    for b, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        if start < end:
            alone = OP(
                *(t[None, start:end] for t in tokens), *(m[b, None] for m in modulations), norm=norm, impl="fused"
            )
            alone = alone if isinstance(alone, tuple) else (alone,)
            assert all(torch.equal(whole[start:end], one[0]) for whole, one in zip(packed, alone, strict=False))
    assert all(not grad[1].any() for grad in packed[-MODULATIONS:])


def test_packed_per_token():
    cu_seqlens = torch.tensor([0, 2, 5])
    tensors = [t.view(5, 8) for t in arguments(1, 5, 8, True)]
    checks.check_accuracy(OP, tensors, cu_seqlens=cu_seqlens)


def test_modulations_per_sample_and_per_token_together():
    tensors = arguments(2, 3, 8, True)
    tensors[-1] = torch.randn(2, 8)
    checks.check_accuracy(OP, tensors)


def test_chunks_of_one_projection_and_strided_tokens():
    tokens = [torch.randn(16, 3, 2).permute(2, 1, 0) for _ in range(TOKENS)]
    modulations = list(torch.randn(2, 6 * 16).chunk(6, dim=1))[:MODULATIONS]
    plain = checks.results(OP, [t.contiguous() for t in (*tokens, *modulations)], impl="fused")
    for a, b in zip(checks.results(OP, [*tokens, *modulations], impl="fused"), plain, strict=True):
        assert torch.equal(a, b)


def test_result_in_another_dtype():
    tensors = arguments(2, 3, 16, False)
    for impl in ("fused", "reference"):
        out = OP(*tensors, out_dtype=BF16, impl=impl)
        *x_new, h = out if isinstance(out, tuple) else (out,)
        assert h.dtype == BF16
        assert all(t.dtype == F32 for t in x_new)


def test_large_and_constant_rows_stay_finite():
    tensors = arguments(2, 3, 16, False)
    tensors[0][0] = 3e18  # the square overflows fp32; the deviation is zero
    tensors[0][1] *= 1e-20
    for t in checks.results(OP, tensors, impl="fused"):
        assert t.isfinite().all()


def test_repeats_bit_for_bit():
    checks.check_repeats(OP, arguments(2, 70, 16, False))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    checks.check_compiles(OP, arguments(2, 3, 16, False), dynamic=dynamic)


def test_nothing_is_left_unwritten(monkeypatch):
    tensors = arguments(3, 37, 24, False)
    plain = checks.results(OP, tensors, impl="fused")
    checks.poison_empty(monkeypatch)
    for poisoned, right in zip(checks.results(OP, tensors, impl="fused"), plain, strict=True):
        assert torch.equal(poisoned, right)


@pytest.mark.parametrize("width", [7, 12, 8200])
def test_widths_that_no_kernel_takes(width):
    with pytest.raises(ValueError, match=rf"a multiple of 8 up to 8192, not {width}"):
        OP(*arguments(1, 1, width, False), impl="fused")


def test_float64_has_no_kernel():
    with pytest.raises(ValueError, match=r"x is torch.float64"):
        OP(*(t.double() for t in arguments(1, 2, 8, False)), impl="fused")


@pytest.mark.parametrize(("name", "value"), [("impl", "triton"), ("norm", "batch")])
def test_unknown_choices(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* not '{value}'"):
        OP(*arguments(1, 2, 8, False), **{name: value})


@pytest.mark.parametrize("cu_seqlens", [torch.zeros(3), torch.zeros(1, dtype=torch.int32), torch.zeros(2, 2).int()])
def test_bad_cu_seqlens(cu_seqlens):
    tensors = [t[0] for t in arguments(1, 4, 8, True)]
    with pytest.raises(ValueError, match=r"cu_seqlens must be int32 or int64 of shape \(B \+ 1,\)"):
        OP(*tensors, cu_seqlens=cu_seqlens)


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
