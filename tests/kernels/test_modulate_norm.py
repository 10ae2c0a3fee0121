import itertools

import checks
import pytest
import torch
from torch.library import opcheck
from util import BF16_ROUNDING, relative_error

from fastmask.kernels import add_gated_norm, modulate_norm
from fastmask.kernels._triton import _common
from fastmask.kernels.modulate_norm import modulate_norm_bwd, modulate_norm_fwd

OP, TOKENS, MODULATIONS = modulate_norm, 1, 2
BF16, F32 = torch.bfloat16, torch.float32

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
    assert relative_error(out, exact) < 5e-7
    assert relative_error(modulate_norm(x.double(), shift.double(), scale.double()), exact) < 1e-14


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
    assert relative_error(modulate_norm(x, shift, scale, eps=eps), modulated_by_loops(x, shift, scale, eps)) < 1e-13


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
@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (2, 1, 5), (1, 5), (5,), (2, 3, 1)])
def test_a_modulation_that_fits_neither_form(name, shape):
    fitting = {"x": torch.zeros(2, 3, 5), "shift": torch.zeros(2, 5), "scale": torch.zeros(2, 5)}
    with pytest.raises(ValueError, match=rf"{name} must have shape \(2, 5\) or \(2, 3, 5\) for x of shape"):
        modulate_norm(**{**fitting, name: torch.zeros(shape)})


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 5, 1)])
def test_tokens_of_another_rank(shape):
    with pytest.raises(ValueError, match=r"x must have shape \(B, K, D\), or \(N, D\) with cu_seqlens, not "):
        modulate_norm(torch.zeros(shape), torch.zeros(2, 5), torch.zeros(2, 5))


# The kernels

# What both ops take from `_layout` and `_common`; the number is that of their tensors of tokens.
OPS = {modulate_norm: 1, add_gated_norm: 2}


def DTYPES(x, branch, modulation):
    return x, modulation, modulation


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


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (2, 0), (0, 0)])
def test_no_tokens_at_all(op, batch, tokens, per_token):
    """Gradients of modulations are zero, and every other result is empty."""
    modulation = (batch, tokens, 8) if per_token else (batch, 8)
    shapes = [(batch, tokens, 8)] * OPS[op] + [modulation] * (OPS[op] + 1)
    results = checks.results(op, [torch.randn(shape) for shape in shapes], impl="fused")
    assert [t.shape for t in results[-len(shapes) :]] == [torch.Size(shape) for shape in shapes]
    assert not any(t.any() for t in results)


@pytest.mark.parametrize("op", OPS)
def test_strided_cu_seqlens(op):
    tensors = [torch.randn(5, 8) for _ in range(OPS[op])] + [torch.randn(2, 8) for _ in range(OPS[op] + 1)]
    packed = torch.tensor([0, 1, 2, 4, 5, 5], dtype=torch.int32)[::2]
    plain = checks.results(op, tensors, cu_seqlens=packed.contiguous(), impl="fused")
    assert all(map(torch.equal, checks.results(op, tensors, cu_seqlens=packed, impl="fused"), plain))


def test_more_rows_than_a_grid_has_programs(monkeypatch):
    assert _common.num_chunks(2**31, 1, 16) == 65535
    monkeypatch.setattr(_common, "_MAX_CHUNKS", 2)
    checks.check_accuracy(OP, arguments(1, 70, 8, False))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_tensors_on_several_devices(op, impl):
    tensors = [torch.randn(4, 8) for _ in range(OPS[op])] + [torch.randn(2, 8) for _ in range(OPS[op] + 1)]
    with pytest.raises(ValueError, match="scale must be on cpu, like the rest, not on meta"):
        op(*tensors[:-1], tensors[-1].to("meta"), cu_seqlens=torch.tensor([0, 1, 4]), impl=impl)
    with pytest.raises(ValueError, match="cu_seqlens must be on cpu, like the rest, not on meta"):
        op(*tensors, cu_seqlens=torch.tensor([0, 1, 4], device="meta"), impl=impl)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.float64])
def test_results_in_a_dtype_that_no_kernel_writes(op, dtype):
    tensors = [torch.randn(1, 2, 8) for _ in range(OPS[op])] + [torch.randn(1, 8) for _ in range(OPS[op] + 1)]
    with pytest.raises(ValueError, match=f"out_dtype is {dtype}"):
        op(*tensors, out_dtype=dtype, impl="fused")
