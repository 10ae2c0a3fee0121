import checks
import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from fastmask.kernels import add_gated_linear, add_gated_norm, modulate_norm, modulated_linear

BF16 = torch.bfloat16


def arguments(op, shape, out=24, per_token=False, x=torch.float32, low=torch.float32):
    """Tokens and modulations, and a Linear: residual in ``x``, the rest in ``low``."""
    modulation = shape if per_token else (shape[0], shape[-1])
    tensors = [torch.randn(shape).to(x)]
    if op is add_gated_linear:
        tensors += [torch.randn(shape).to(low), torch.randn(modulation).to(low)]
    tensors += [torch.randn(modulation).to(low) for _ in range(2)]
    return [*tensors, torch.randn(out, shape[-1]).to(low), torch.randn(out).to(low)]


OPS = pytest.mark.parametrize("op", [modulated_linear, add_gated_linear])


@OPS
@pytest.mark.parametrize(("x", "low"), [(torch.float32, torch.float32), (torch.float32, BF16), (BF16, BF16)])
def test_accuracy(op, x, low):
    checks.check_accuracy(op, arguments(op, (2, 5, 56), x=x, low=low))


@OPS
def test_per_token_and_rms(op):
    checks.check_accuracy(op, arguments(op, (2, 3, 8), per_token=True), norm="rms", eps=1e-3)


@OPS
def test_packed(op):
    cu_seqlens = torch.tensor([0, 3, 3, 8])
    tensors = arguments(op, (8, 16))
    modulations = range(2, 5) if op is add_gated_linear else range(1, 3)
    for i in modulations:
        tensors[i] = tensors[i][:3].clone()
    checks.check_accuracy(op, tensors, cu_seqlens=cu_seqlens)


@OPS
def test_it_is_the_norm_and_then_the_linear(op):
    tensors = arguments(op, (2, 3, 16))
    *first, weight, bias = tensors
    out = op(*tensors, impl="fused")
    if op is add_gated_linear:
        x_new, h = add_gated_norm(*first, impl="reference")
        torch.testing.assert_close(out[0], x_new)
        out = out[1]
    else:
        h = modulate_norm(*first, impl="reference")
    torch.testing.assert_close(out, nn.functional.linear(h, weight, bias), rtol=1e-5, atol=1e-5)


@OPS
@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_autocast_rounds_the_norm_for_the_product(op, impl):
    tensors = [t.requires_grad_() for t in arguments(op, (2, 3, 16))]
    with torch.autocast("cpu", dtype=BF16):
        out = op(*tensors, impl=impl)
    y = out[1] if isinstance(out, tuple) else out
    assert y.dtype == BF16
    if isinstance(out, tuple):
        assert out[0].dtype == torch.float32
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


@OPS
def test_both_forms_agree_under_autocast(op):
    tensors = arguments(op, (2, 3, 16), out=8)
    by_form = []
    for impl in ("fused", "reference"):
        with torch.autocast("cpu", dtype=BF16):
            by_form.append(checks.results(op, tensors, impl=impl))
    for fused, reference in zip(*by_form, strict=True):
        torch.testing.assert_close(fused, reference, rtol=0.03, atol=0.06)


@OPS
def test_the_norm_is_not_kept(op):
    tensors = [t.requires_grad_() for t in arguments(op, (2, 5, 16), out=48)]
    kept = {}
    with saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        op(*tensors, impl="fused")
    rows = sum(t.untyped_storage().nbytes() for t in kept.values() if t.untyped_storage().nbytes() >= 2 * 5 * 16 * 4)
    of_weight = 48 * 16 * 4
    inputs = 2 if op is add_gated_linear else 1  # the residual, and the branch
    assert rows == inputs * 2 * 5 * 16 * 4 + of_weight


@OPS
def test_repeats_bit_for_bit(op):
    checks.check_repeats(op, arguments(op, (2, 40, 16), low=BF16))


@OPS
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(op, dynamic):
    checks.check_compiles(op, arguments(op, (2, 3, 16)), dynamic=dynamic)


@OPS
def test_two_calls_in_one_dynamic_graph(op):
    def twice(*tensors, impl):
        both = [op(*tensors, impl=impl) for _ in range(2)]
        return tuple(t for out in both for t in (out if isinstance(out, tuple) else (out,)))

    checks.check_compiles(twice, arguments(op, (2, 3, 16)), dynamic=True)


def test_an_unused_result_gets_no_gradient():
    tensors = arguments(add_gated_linear, (2, 3, 16))
    for used in (0, 1):
        by_form = []
        for impl in ("fused", "reference"):
            leaves = [t.clone().requires_grad_() for t in tensors]
            add_gated_linear(*leaves, impl=impl)[used].square().sum().backward()
            by_form.append([torch.zeros_like(t) if t.grad is None else t.grad for t in leaves])
        for fused, reference in zip(*by_form, strict=True):
            torch.testing.assert_close(fused, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: torch.zeros(24, 8)}, r"weight must have shape \(E, 16\) for x of shape \(2, 3, 16\), not \(24, 8\)"),
        ({4: torch.zeros(3)}, r"bias must have shape \(24,\), not \(3,\)"),
        ({1: torch.zeros(3, 16)}, r"shift must have shape \(2, 16\) or \(2, 3, 16\)"),
    ],
)
def test_shapes_that_do_not_fit(impl, change, message):
    tensors = arguments(modulated_linear, (2, 3, 16))
    for i, tensor in change.items():
        tensors[i] = tensor
    with pytest.raises(ValueError, match=message):
        modulated_linear(*tensors, impl=impl)


@OPS
def test_weight_and_bias_of_different_dtypes(op):
    tensors = arguments(op, (2, 3, 16), low=BF16)
    tensors[-1] = tensors[-1].float()
    checks.check_accuracy(op, tensors)


@OPS
def test_autocast_leaves_float64_alone(op):
    tensors = [t.double() for t in arguments(op, (2, 3, 16))]
    plain = op(*tensors)
    with torch.autocast("cpu", dtype=BF16):
        assert all(map(torch.equal, op(*tensors), plain))
