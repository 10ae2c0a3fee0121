"""What `modulate_norm` and `add_gated_norm` have in common: each test runs for both."""

import itertools

import checks
import pytest
import torch

from fastmask.kernels import add_gated_norm, modulate_norm
from fastmask.kernels._triton import _common
from fastmask.testing import norm_error_over_bound, poisoned

BF16, F32 = torch.bfloat16, torch.float32

# The number of their tensors of tokens; of modulations they have one more.
OPS = {modulate_norm: 1, add_gated_norm: 2}

pytestmark = pytest.mark.parametrize("op", OPS)


def arguments(op, batch, tokens, width, per_token):
    modulation = (batch, tokens, width) if per_token else (batch, width)
    x, *rest = (torch.randn(shape) for shape in [(batch, tokens, width)] * OPS[op] + [modulation] * (OPS[op] + 1))
    return [x * 3 + 1, *rest]


def dtypes_of(op, x, branch, modulation):
    return [x, branch][: OPS[op]] + [modulation] * (OPS[op] + 1)


WIDTHS = [8, 56, 1152]


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_kernel_accuracy(op, width, per_token, norm):
    checks.check_accuracy(op, arguments(op, 2, 3, width, per_token), norm=norm, eps=1e-5)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 35), (1, 64)])
def test_kernel_accuracy_where_several_programs_share_a_sample(op, batch, tokens):
    checks.check_accuracy(op, arguments(op, batch, tokens, 16, False))


def test_rows_far_from_zero(op):
    """The mean is rounded, and 100 deviations large; a variance from the squares as they are loses that once more."""
    x, *rest = arguments(op, 2, 40, 56, False)
    tensors = [x / 3 + 100, *rest]
    h, exact = (
        out[-1] if isinstance(out, tuple) else out
        for out in (op(*tensors, impl="fused"), op(*(t.double() for t in tensors)))
    )
    assert norm_error_over_bound(h, exact, OPS[op], least=100 * float(exact.norm())) < 1


@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (F32, BF16, F32), (F32, BF16, BF16), (BF16, F32, F32)], ids=str)
def test_kernel_accuracy_of_mixed_dtypes(op, dtypes):
    tensors = arguments(op, 2, 40, 64, False)
    checks.check_accuracy(op, [t.to(dtype) for t, dtype in zip(tensors, dtypes_of(op, *dtypes), strict=True)])


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_packed_samples(op, norm):
    cu_seqlens = torch.tensor([0, 7, 7, 8, 11], dtype=torch.int32)
    tokens, modulations = arguments(op, 1, 11, 24, False)[: OPS[op]], [torch.randn(4, 24) for _ in range(OPS[op] + 1)]
    tokens = [t[0] for t in tokens]
    checks.check_accuracy(op, [*tokens, *modulations], cu_seqlens=cu_seqlens, norm=norm)
    # Each sample alone gives the same; the gradients of an empty sample's modulations are zero.
    packed = checks.results(op, [*tokens, *modulations], cu_seqlens=cu_seqlens, norm=norm, impl="fused")
    for b, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        if start < end:
            alone = op(
                *(t[None, start:end] for t in tokens), *(m[b, None] for m in modulations), norm=norm, impl="fused"
            )
            alone = alone if isinstance(alone, tuple) else (alone,)
            assert all(torch.equal(whole[start:end], one[0]) for whole, one in zip(packed, alone, strict=False))
    assert all(not grad[1].any() for grad in packed[-OPS[op] - 1 :])


def test_packed_per_token(op):
    cu_seqlens = torch.tensor([0, 2, 5])
    tensors = [t.view(5, 8) for t in arguments(op, 1, 5, 8, True)]
    checks.check_accuracy(op, tensors, cu_seqlens=cu_seqlens)


def test_modulations_per_sample_and_per_token_together(op):
    tensors = arguments(op, 2, 3, 8, True)
    tensors[-1] = torch.randn(2, 8)
    checks.check_accuracy(op, tensors)


def test_chunks_of_one_projection_and_strided_tokens(op):
    tokens = [torch.randn(16, 3, 2).permute(2, 1, 0) for _ in range(OPS[op])]
    modulations = list(torch.randn(2, 6 * 16).chunk(6, dim=1))[: OPS[op] + 1]
    plain = checks.results(op, [t.contiguous() for t in (*tokens, *modulations)], impl="fused")
    for a, b in zip(checks.results(op, [*tokens, *modulations], impl="fused"), plain, strict=True):
        assert torch.equal(a, b)


def test_result_in_another_dtype(op):
    tensors = arguments(op, 2, 3, 16, False)
    for impl in ("fused", "reference"):
        out = op(*tensors, out_dtype=BF16, impl=impl)
        *x_new, h = out if isinstance(out, tuple) else (out,)
        assert h.dtype == BF16
        assert all(t.dtype == F32 for t in x_new)


def test_large_and_constant_rows_stay_finite(op):
    tensors = arguments(op, 2, 3, 16, False)
    tensors[0][0] = 3e18  # the square overflows fp32; the deviation is zero
    tensors[0][1] *= 1e-20
    for t in checks.results(op, tensors, impl="fused"):
        assert t.isfinite().all()


def test_repeats_bit_for_bit(op):
    checks.check_repeats(op, arguments(op, 2, 70, 16, False))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(op, dynamic):
    checks.check_compiles(op, arguments(op, 2, 3, 16, False), dynamic=dynamic)


def test_nothing_is_left_unwritten(op):
    tensors = arguments(op, 3, 37, 24, False)
    plain = checks.results(op, tensors, impl="fused")
    with poisoned():
        written = checks.results(op, tensors, impl="fused")
    assert all(map(torch.equal, written, plain))


@pytest.mark.parametrize("width", [7, 12, 8200])
def test_widths_that_no_kernel_takes(op, width):
    with pytest.raises(ValueError, match=rf"a multiple of 8 up to 8192, not {width}"):
        op(*arguments(op, 1, 1, width, False), impl="fused")


def test_float64_has_no_kernel(op):
    with pytest.raises(ValueError, match=r"x is torch.float64"):
        op(*(t.double() for t in arguments(op, 1, 2, 8, False)), impl="fused")


@pytest.mark.parametrize(("name", "value"), [("impl", "triton"), ("norm", "batch")])
def test_unknown_choices(op, name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* not '{value}'"):
        op(*arguments(op, 1, 2, 8, False), **{name: value})


@pytest.mark.parametrize("cu_seqlens", [torch.zeros(3), torch.zeros(1, dtype=torch.int32), torch.zeros(2, 2).int()])
def test_bad_cu_seqlens(op, cu_seqlens):
    tensors = [t[0] for t in arguments(op, 1, 4, 8, True)]
    with pytest.raises(ValueError, match=r"cu_seqlens must be int32 or int64 of shape \(B \+ 1,\)"):
        op(*tensors, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (2, 0), (0, 0)])
def test_no_tokens_at_all(op, batch, tokens, per_token):
    """Gradients of modulations are zero, and every other result is empty."""
    modulation = (batch, tokens, 8) if per_token else (batch, 8)
    shapes = [(batch, tokens, 8)] * OPS[op] + [modulation] * (OPS[op] + 1)
    results = checks.results(op, [torch.randn(shape) for shape in shapes], impl="fused")
    assert [t.shape for t in results[-len(shapes) :]] == [torch.Size(shape) for shape in shapes]
    assert not any(t.any() for t in results)


def test_strided_cu_seqlens(op):
    tensors = [torch.randn(5, 8) for _ in range(OPS[op])] + [torch.randn(2, 8) for _ in range(OPS[op] + 1)]
    packed = torch.tensor([0, 1, 2, 4, 5, 5], dtype=torch.int32)[::2]
    plain = checks.results(op, tensors, cu_seqlens=packed.contiguous(), impl="fused")
    assert all(map(torch.equal, checks.results(op, tensors, cu_seqlens=packed, impl="fused"), plain))


def test_more_rows_than_a_grid_has_programs(op, monkeypatch):
    assert _common.num_chunks(2**31, 1, 16) == 65535
    monkeypatch.setattr(_common, "_MAX_CHUNKS", 2)
    checks.check_accuracy(op, arguments(op, 1, 70, 8, False))


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_tensors_on_several_devices(op, impl):
    tensors = [torch.randn(4, 8) for _ in range(OPS[op])] + [torch.randn(2, 8) for _ in range(OPS[op] + 1)]
    with pytest.raises(ValueError, match="scale must be on cpu, like the rest, not on meta"):
        op(*tensors[:-1], tensors[-1].to("meta"), cu_seqlens=torch.tensor([0, 1, 4]), impl=impl)
    with pytest.raises(ValueError, match="cu_seqlens must be on cpu, like the rest, not on meta"):
        op(*tensors, cu_seqlens=torch.tensor([0, 1, 4], device="meta"), impl=impl)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64])
def test_results_in_a_dtype_that_no_kernel_writes(op, dtype):
    tensors = [torch.randn(1, 2, 8) for _ in range(OPS[op])] + [torch.randn(1, 8) for _ in range(OPS[op] + 1)]
    with pytest.raises(ValueError, match=f"out_dtype is {dtype}"):
        op(*tensors, out_dtype=dtype, impl="fused")
