import checks
import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.library import opcheck

from fastmask.kernels import gelu_linear
from fastmask.kernels.gelu_linear import gelu_bwd, gelu_fwd
from fastmask.testing import assert_accurate, poisoned

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def arguments(*shape, out=7, dtype=torch.float32):
    return [t.to(dtype) for t in (torch.randn(*shape), torch.randn(out, shape[-1]), torch.randn(out))]


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("shape", [(2, 3, 9), (40, 1), (5, 700)])
def test_accuracy(shape, dtype):
    checks.check_accuracy(gelu_linear, arguments(*shape, dtype=dtype))


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_it_is_the_gelu_and_then_the_linear(impl):
    x, weight, bias = arguments(4, 9)
    expected = F.linear(F.gelu(x, approximate="tanh"), weight, bias)
    torch.testing.assert_close(gelu_linear(x, weight, bias, impl=impl), expected)


@pytest.mark.parametrize(("x", "weight", "bias"), [(F32, BF16, BF16), (BF16, F32, F32), (F16, BF16, F32)])
def test_accuracy_of_mixed_dtypes(x, weight, bias):
    """GELU is rounded once, to the dtype of the weight, whatever the input's."""
    tensors = [t.to(dtype) for t, dtype in zip(arguments(5, 40), (x, weight, bias), strict=True)]
    checks.check_accuracy(gelu_linear, tensors)
    exact = F.gelu(tensors[0].double(), approximate="tanh")
    assert gelu_fwd(tensors[0], weight).dtype == weight
    assert_accurate(gelu_fwd(tensors[0], weight), exact, exact.to(weight))


def test_far_values_neither_overflow_nor_turn_nan():
    x = torch.tensor([-1e30, -1e4, -30.0, -0.0, 0.0, 30.0, 1e4], dtype=torch.float32)
    exact = F.gelu(x.double(), approximate="tanh")
    assert_accurate(gelu_fwd(x), exact, F.gelu(x, approximate="tanh"))
    grad, again = gelu_bwd(torch.ones_like(x), x)
    assert torch.equal(again, gelu_fwd(x))
    expected = torch.tensor([0, 0, 0.5, 0.5, 1, 1])
    torch.testing.assert_close(grad[[1, 2, 3, 4, 5, 6]], expected, rtol=0, atol=1e-30)


def test_only_the_input_is_kept():
    x, weight, bias = (t.requires_grad_() for t in arguments(6, 16))
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gelu_linear(x, weight, bias, impl="fused")
    assert sorted(tuple(t.shape) for t in kept) == [(6, 16), (7, 16)]


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_autocast(impl):
    x, weight, bias = (t.requires_grad_() for t in arguments(3, 16))
    with torch.autocast("cpu", dtype=BF16):
        y = gelu_linear(x.to(BF16), weight, bias, impl=impl)
    assert y.dtype == BF16
    y.float().sum().backward()
    assert weight.grad.dtype == x.grad.dtype == torch.float32


def test_nothing_is_left_unwritten():
    x = torch.randn(3, 701)
    plain = [gelu_fwd(x), *gelu_bwd(torch.ones_like(x), x)]
    with poisoned():
        written = [gelu_fwd(x), *gelu_bwd(torch.ones_like(x), x)]
    assert all(map(torch.equal, written, plain))
    assert torch.equal(plain[2], plain[0])


def test_non_contiguous_input():
    x, weight, bias = torch.randn(9, 4).t(), torch.randn(9, 7).t(), torch.randn(14)[::2]
    torch.testing.assert_close(
        gelu_linear(x, weight, bias, impl="fused"), gelu_linear(x, weight, bias, impl="reference")
    )


def test_repeats_bit_for_bit():
    checks.check_repeats(gelu_linear, arguments(5, 33, dtype=BF16))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    checks.check_compiles(gelu_linear, arguments(2, 3, 16), dynamic=dynamic)


def test_opcheck():
    x = torch.randn(3, 8)
    opcheck(gelu_fwd, (x,))
    opcheck(gelu_fwd, (x, BF16))
    opcheck(gelu_bwd, (x, x))
    opcheck(gelu_bwd, (x.to(BF16), x))


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_shapes_that_do_not_fit(impl):
    x, weight, bias = arguments(3, 16)
    with pytest.raises(ValueError, match=r"weight must have shape \(E, 16\) for x of shape \(3, 16\), not \(7, 15\)"):
        gelu_linear(x, weight[:, 1:], bias, impl=impl)
    with pytest.raises(ValueError, match=r"bias must have shape \(7,\), not \(6,\)"):
        gelu_linear(x, weight, bias[1:], impl=impl)


def test_float64_has_no_kernel():
    with pytest.raises(ValueError, match=r'x is torch.float64: impl="reference" takes any'):
        gelu_linear(*arguments(3, 16, dtype=torch.float64), impl="fused")
