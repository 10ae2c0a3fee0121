import checks
import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.library import opcheck

from fastmask.kernels import silu_linear
from fastmask.kernels._dispatch import has_native
from fastmask.kernels.silu_linear import MAX_ROWS, silu_linear_bwd, silu_linear_fwd
from fastmask.testing import assert_accurate

native = pytest.mark.skipif(not has_native("silu_linear_fwd"), reason="no native kernels here")
ROWS = [1, 2, 3, 4, 5, 7, 8, MAX_ROWS]


def arguments(rows, width=40, out=301, dtype=torch.float32):
    return [t.to(dtype) for t in (torch.randn(rows, width) * 3, torch.randn(out, width), torch.randn(out))]


@pytest.mark.parametrize("rows", [*ROWS, MAX_ROWS + 1])
def test_accuracy(rows):
    checks.check_accuracy(silu_linear, arguments(rows))


@pytest.mark.parametrize(("width", "out"), [(8, 1), (1152, 6), (40, 3), (16, 1030), (9, 5)])
def test_accuracy_of_other_shapes(width, out):
    checks.check_accuracy(silu_linear, arguments(3, width, out))


@pytest.mark.parametrize("impl", [None, "fused", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_silu_and_then_the_linear(impl, dtype):
    x, weight, bias = arguments(4, dtype=dtype)
    torch.testing.assert_close(silu_linear(x, weight, bias, impl=impl), F.linear(F.silu(x), weight, bias))


@native
def test_what_takes_the_native_kernel():
    """Few rows in fp32; more of them, other dtypes and autocast take PyTorch's products."""

    def taken(*tensors):
        with torch.profiler.profile() as seen:
            silu_linear(*tensors)
        return any(event.name == "fastmask::silu_linear_fwd" for event in seen.events())

    assert taken(*arguments(1))
    assert taken(*arguments(MAX_ROWS))
    assert not taken(*arguments(MAX_ROWS + 1))
    assert not taken(*arguments(4, dtype=torch.bfloat16))
    assert not taken(*arguments(4, width=9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not taken(*arguments(4))


@native
@pytest.mark.parametrize("rows", ROWS)
def test_gradients_against_float64(rows):
    x, weight, bias = (t.double().requires_grad_() for t in arguments(rows))
    grad = torch.randn(rows, len(bias)).double()
    F.linear(F.silu(x), weight, bias).backward(grad)
    exact = [x.grad, weight.grad, bias.grad]
    eager = [t.detach().float().requires_grad_() for t in (x, weight, bias)]
    F.linear(F.silu(eager[0]), eager[1], eager[2]).backward(grad.float())
    found = silu_linear_bwd(grad.float(), x.detach().float(), weight.detach().float())
    for ours, true, theirs in zip(found, exact, eager, strict=True):
        assert_accurate(ours, true, theirs.grad)


@native
def test_threads_do_not_change_the_bits():
    x, weight, bias = arguments(4, 64, 3000)
    grad, before = torch.randn(4, 3000), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append([silu_linear_fwd(x, weight, bias), *silu_linear_bwd(grad, x, weight)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@native
def test_unaligned_addresses():
    x, weight, bias = arguments(3)
    moved = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in (x, weight, bias)]
    assert all(t.data_ptr() % 8 for t in moved)
    assert torch.equal(silu_linear_fwd(*moved), silu_linear_fwd(x, weight, bias))
    grad = torch.randn(3, len(bias))
    for a, b in zip(silu_linear_bwd(grad, *moved[:2]), silu_linear_bwd(grad, x, weight), strict=True):
        assert torch.equal(a, b)


@native
def test_nan_and_far_values():
    x, weight, bias = torch.ones(3, 8), torch.ones(2, 8), torch.zeros(2)
    x[0], x[1, 0], x[2] = -1e4, torch.nan, 1e4
    y = silu_linear_fwd(x, weight, bias)
    assert y[0].tolist() == [0, 0]
    assert y[1].isnan().all()
    assert y[2].tolist() == [8e4, 8e4]


@native
def test_only_the_condition_is_kept():
    x, weight, bias = (t.requires_grad_() for t in arguments(4, 16, 7))
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        silu_linear(x, weight, bias)
    assert sorted(tuple(t.shape) for t in kept) == [(4, 16), (7, 16)]


def test_non_contiguous_input():
    x, weight, bias = torch.randn(16, 4).t(), torch.randn(16, 7).t(), torch.randn(14)[::2]
    torch.testing.assert_close(silu_linear(x, weight, bias), silu_linear(x, weight, bias, impl="reference"))


def test_repeats_bit_for_bit():
    checks.check_repeats(silu_linear, arguments(5))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    checks.check_compiles(silu_linear, arguments(4, 16), dynamic=dynamic)


@native
def test_opcheck():
    x, weight, bias = arguments(3, 8, 5)
    opcheck(silu_linear_fwd, (x, weight, bias))
    opcheck(silu_linear_bwd, (torch.randn(3, 5), x, weight))


def test_shapes_that_do_not_fit():
    x, weight, bias = arguments(3, 16, 7)
    with pytest.raises(ValueError, match=r"x must have shape \(B, D\), not \(1, 3, 16\)"):
        silu_linear(x[None], weight, bias)
    with pytest.raises(ValueError, match=r"weight must have shape \(E, 16\)"):
        silu_linear(x, weight[:, 1:], bias)
