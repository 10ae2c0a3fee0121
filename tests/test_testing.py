"""The rule of accuracy must notice what goes wrong in kernels, and nothing else."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastmask.testing import (
    assert_accurate,
    assert_near,
    assert_network_accurate,
    assert_op_accurate,
    error_over_bound,
    fault,
    network_errors_over_bound,
    network_steps,
    norm_error_over_bound,
    op_errors_over_bound,
    poisoned,
    relative_error,
    results,
    weights_like,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
U32 = 2.0**-24


def pair(*shape, dtype=torch.float32):
    """A rounded result, and the exact one."""
    exact = torch.randn(*(shape or (40, 33)), dtype=torch.float64)
    return exact.to(dtype), exact


# The rule for an op


@DTYPES
def test_a_rounded_result_is_accurate(dtype):
    eager, exact = pair(dtype=dtype)
    assert 0 < error_over_bound(eager, exact, eager) < 0.5
    assert_accurate(eager, exact, eager)
    assert fault(eager, exact, eager) == ""


def shifted_row(t):
    t[7] = t[8].clone()


def biased(t):
    t.add_(0.01)


def unwritten_tail(t):
    t[-1, -3:] = torch.nan


def zero_tail(t):
    t[-1, -3:] = 0


def scaled(t):
    t.mul_(1.02)


def infinite(t):
    t[0, 0] = torch.inf


def no_bias_in_one_row(t):
    t[3].sub_(0.25)


@DTYPES
@pytest.mark.parametrize(
    "damage", [shifted_row, biased, unwritten_tail, zero_tail, scaled, infinite, no_bias_in_one_row]
)
def test_damage_is_seen(damage, dtype):
    eager, exact = pair(dtype=dtype)
    actual = eager.clone()
    damage(actual)
    assert error_over_bound(actual, exact, eager) > 1
    with pytest.raises(AssertionError, match=r"^result: error (inf|[\d.e+]+) times its bound, 1 is allowed: rms "):
        assert_accurate(actual, exact, eager)


@pytest.mark.parametrize("length", [8, 64, 4096])
def test_a_biased_or_narrow_sum_is_seen(length):
    """Of 256 rows: a sum in bfloat16, one of values rounded to it, and one without its last value."""
    x = torch.rand(256, length) + 0.5
    exact, eager = x.double().sum(1), x.sum(1)
    narrow = torch.zeros(256, dtype=torch.bfloat16)
    for column in x.T:
        narrow += column.bfloat16()
    for wrong in (narrow.float(), x.bfloat16().float().sum(1), x[:, :-1].sum(1), eager * (1 + 2e-6)):
        assert error_over_bound(wrong, exact, eager) > 1


def test_a_wrong_eps_is_seen():
    x = torch.randn(64, 48) * 0.1
    exact, eager = (F.layer_norm(t, (48,), eps=1e-6) for t in (x.double(), x))
    assert error_over_bound(F.layer_norm(x, (48,), eps=1e-5), exact, eager) > 1


def test_another_dtype_or_shape():
    eager, exact = pair()
    for actual, said in ((eager.double(), "dtype torch.float64, not torch.float32"), (eager[:-1], r"shape \(39, 33\)")):
        assert error_over_bound(actual, exact, eager) == math.inf
        with pytest.raises(AssertionError, match=f"^result: {said}"):
            assert_accurate(actual, exact, eager)
    assert error_over_bound(eager, exact[:1], eager) == math.inf
    assert error_over_bound(eager.int(), exact, eager.int()) == math.inf


def test_integers_must_be_equal():
    ids = torch.arange(6)
    assert error_over_bound(ids, ids, ids) == 0
    assert error_over_bound(ids + (ids == 3), ids, ids) == math.inf
    assert fault(ids + 1, ids, ids) == "differs from the reference"


def test_nothing_and_zeros():
    empty, zeros = torch.zeros(0, 3), torch.zeros(4)
    assert error_over_bound(empty, empty.double(), empty) == 0
    assert error_over_bound(zeros, zeros.double(), zeros) == 0
    # Where the right result and PyTorch's are zero, no other is.
    assert error_over_bound(zeros + 1e-30, zeros.double(), zeros) == math.inf


def test_what_cannot_be_judged():
    eager, exact = pair()
    with pytest.raises(ValueError, match=r"exact must be float64, not torch\.float32"):
        error_over_bound(eager, exact.float(), eager)
    for name in ("exact", "eager"):
        wrong = {"exact": exact.clone(), "eager": eager.clone()}
        wrong[name][0, 0] = torch.nan
        with pytest.raises(ValueError, match=f"^{name} must be finite"):
            error_over_bound(eager, **wrong)


@pytest.mark.parametrize("roundings", [1, 4])
@pytest.mark.parametrize("count", [8, 64, 1024])
def test_equally_good_roundings_pass(count, roundings):
    """Two programs whose errors are independent and of as many roundings in the RMS; either may be the kernel."""
    exact = torch.randn(2000, count, dtype=torch.float64)
    exact = exact / exact.square().mean(1, keepdim=True).sqrt()
    one, other = (exact + roundings * U32 * torch.randn_like(exact) for _ in range(2))
    over = [error_over_bound(a.float(), e, b.float()) for e, a, b in zip(exact, one, other, strict=True)]
    assert max(over) < 1


@pytest.mark.parametrize("length", [16, 256, 4096])
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_sums_in_another_order_pass(length, lanes):
    """Of few rows, in vectors of so many lanes and pieces of 256, as on processors of three generations."""
    x = torch.randn(8, length)
    total = torch.zeros(8)
    for piece in x.split(256, 1):
        sums = torch.zeros(8, lanes)
        for values in piece.split(lanes, 1):
            sums += values
        total += sums.sum(1)
    assert error_over_bound(total, x.double().sum(1), x.sum(1)) < 1


def test_more_is_allowed_of_others():
    eager, exact = pair()
    over = error_over_bound(exact.float() * (1 + 4e-7), exact, eager)
    assert 1 < over < 4
    assert fault(exact.float() * (1 + 4e-7), exact, eager, times=4) == ""


# The rule for networks


def test_the_norm_sees_what_is_wrong():
    exact = torch.arange(1.0, 61.0).reshape(6, 10)
    last_bit = torch.nextafter(exact, torch.full_like(exact, torch.inf))
    unwritten = exact.clone()
    unwritten[-1] = 0
    poisoned_value = exact.clone()
    poisoned_value[2, 3] = torch.nan
    assert relative_error(exact, exact) == 0
    assert 0 < relative_error(last_bit, exact) < 2e-7
    assert relative_error(exact * 1.001, exact) == pytest.approx(1e-3, rel=1e-3)
    assert not relative_error(poisoned_value, exact) < 1e9
    assert norm_error_over_bound(last_bit, exact) <= 1
    for wrong in (exact.roll(1, 0), exact * 1.00001, unwritten, poisoned_value):
        assert norm_error_over_bound(wrong, exact, network_steps(3)) > 1
        with pytest.raises(
            AssertionError, match=r"^raw: error (inf|[\d.e+]+) times its bound: (nan|[\d.e-]+) of the n"
        ):
            assert_near(wrong, exact, network_steps(3), name="raw")
    assert norm_error_over_bound(exact[:1], exact) == math.inf
    with pytest.raises(AssertionError, match=r"^result: shape \(1, 10\), not \(6, 10\)"):
        assert_near(exact[:1], exact)
    with pytest.raises(ValueError, match="differ"):
        relative_error(exact[:1], exact)


@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float64, 8), (torch.float32, 8), (torch.bfloat16, 1)], ids=str)
def test_the_bound_grows_with_the_root_of_the_steps(dtype, roundings):
    exact = torch.ones(50, dtype=torch.float64)
    actual = exact + 1e-3
    once = norm_error_over_bound(actual, exact, dtype=dtype)
    assert once == pytest.approx(1e-3 / (roundings * torch.finfo(dtype).eps / 2), rel=1e-9)
    assert norm_error_over_bound(actual, exact, 9, dtype=dtype) == pytest.approx(once / 3, rel=1e-9)
    assert norm_error_over_bound(actual, exact, least=5 * 50**0.5, dtype=dtype) == pytest.approx(once / 5, rel=1e-9)


def test_the_error_of_a_reference_is_allowed_twice():
    exact = torch.ones(50, dtype=torch.float64)
    eager = (exact + 1e-3).float()
    assert norm_error_over_bound((exact + 1.9e-3).float(), exact, eager=eager) < 1
    assert norm_error_over_bound((exact + 2.1e-3).float(), exact, eager=eager) > 1


def test_every_tensor_of_a_network_is_judged_by_itself():
    exact = {"large": torch.randn(90, 50).double(), "small": torch.randn(6).double() * 0.02, "none": torch.zeros(4)}
    exact["none"] = exact["none"].double()
    # The rounding of terms that cancel to a hundredth, and to nothing, of the others.
    actual = {name: (t + 2 * U32 * torch.randn_like(t)).float() for name, t in exact.items()}
    assert max(network_errors_over_bound(actual, exact, network_steps(2)).values()) < 0.7
    assert_network_accurate(actual, exact, network_steps(2))
    for name, wrong in (("small", actual["small"] * 1.01), ("none", actual["none"] + 1e-4)):
        with pytest.raises(
            AssertionError, match=rf"^1 of 3 tensors, most of all {name}: error [\d.e+]+ times its bound"
        ):
            assert_network_accurate({**actual, name: wrong}, exact, network_steps(2))
    with pytest.raises(ValueError, match=r"the names of the tensors differ: \['small'\]"):
        network_errors_over_bound({"large": actual["large"], "none": actual["none"]}, exact, 1)
    with pytest.raises(ValueError, match="the names of the tensors differ: those of eager"):
        network_errors_over_bound(actual, exact, 1, eager={})


def test_the_steps_of_a_network():
    assert network_steps(2, backward=True) == 2 * network_steps(2)
    assert network_steps(5) - network_steps(4) == 12


# An op's results


def product(x, weight, *, out_dtype=None):
    return (x @ weight).to(out_dtype or x.dtype)


def test_results_and_gradients():
    x, weight = torch.randn(3, 4), torch.randn(4, 2)
    y, grad_x, grad_weight = results(product, (x, weight))
    assert torch.equal(y, x @ weight)
    torch.testing.assert_close(grad_x, weights_like(y) @ weight.T)
    torch.testing.assert_close(grad_weight, x.T @ weights_like(y))
    assert len(results(product, {"x": x, "weight": weight}, leaves=["weight"])) == 2
    doubled = results(product, (x, weight), dtype=torch.float64, out_dtype=torch.bfloat16)
    assert all(t.dtype == torch.float64 for t in doubled)
    assert results(product, (x, weight), out_dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert not x.requires_grad


def test_weights_are_the_same_in_every_dtype():
    weights = weights_like(torch.zeros(999, dtype=torch.float64))
    assert weights.min() >= 0.5
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(weights_like(torch.zeros(999, dtype=dtype)).double(), weights)


def test_an_op_that_changes_its_inputs():
    x = torch.randn(9)
    (y,) = results(lambda t: t.add_(1), (x,), in_place=True)
    assert torch.equal(y, x + 1)
    assert op_errors_over_bound(lambda t: t.add_(1), lambda t: t.add_(1), (x,), in_place=True)["result 0"] <= 1
    # A reference that had changed the same tensor would take either for right.
    for wrong in (lambda t: t.add_(0), lambda t: t.fill_(1e6)):
        assert op_errors_over_bound(wrong, lambda t: t.add_(1), (x,), in_place=True)["result 0"] > 1


def test_every_result_and_gradient_of_an_op_is_judged():
    inputs = {"x": torch.randn(30, 20), "weight": torch.randn(20, 10), "ids": torch.arange(3)}

    def reference(x, weight, ids, scale):
        return x @ weight * scale, ids

    def wrong_gradient(x, weight, ids, scale):
        y, ids = reference(x, weight, ids, scale)
        return y + 1e-3 * (weight - weight.detach()).sum(), ids

    def unwritten(x, weight, ids, scale):
        y, ids = reference(x, weight, ids, scale)
        return torch.cat([y[:-1], torch.empty_like(y[-1:]) + 0 * y[-1:]]), ids

    def other_ids(x, weight, ids, scale):
        return x @ weight * scale, ids + 1

    right = op_errors_over_bound(reference, reference, inputs, scale=0.5)
    assert list(right) == ["result 0", "result 1", "gradient of x", "gradient of weight"]
    assert max(right.values()) < 1
    assert_op_accurate(reference, reference, inputs, scale=0.5)
    for wrong, name in ((wrong_gradient, "gradient of weight"), (unwritten, "result 0"), (other_ids, "result 1")):
        assert op_errors_over_bound(wrong, reference, inputs, scale=0.5)[name] > 1
        with pytest.raises(AssertionError, match=f"^{name}: "):
            assert_op_accurate(wrong, reference, inputs, scale=0.5)
    with pytest.raises(ValueError, match="the op and its reference return 3 and 4 results and gradients"):
        op_errors_over_bound(lambda x, weight, ids: x @ weight, lambda **t: (t["x"] @ t["weight"], t["ids"]), inputs)


def test_unwritten_memory_shows_and_settings_come_back():
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.zeros(1).new_empty(2).isnan().all()
        assert torch.empty_like(torch.zeros(2, dtype=torch.bfloat16)).isnan().all()
        assert (torch.empty(2, dtype=torch.int32) == 2**31 - 1).all()
    with pytest.raises(IndexError), poisoned():
        torch.zeros(2)[2]
    after = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    assert before == after
