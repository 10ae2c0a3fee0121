"""The measure of accuracy must itself notice what goes wrong in kernels."""

import pytest
import torch
from util import assert_accurate


def results(dtype=torch.float32):
    exact = torch.randn(40, 33, dtype=torch.float64)
    return exact.to(dtype), exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rounded_result_passes(dtype):
    eager, exact = results(dtype)
    assert_accurate(eager, exact, eager)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("damage", [shifted_row, biased, unwritten_tail, zero_tail, scaled])
def test_damage_fails(damage, dtype):
    eager, exact = results(dtype)
    actual = eager.clone()
    damage(actual)
    with pytest.raises(AssertionError, match="error"):
        assert_accurate(actual, exact, eager)


def test_another_dtype_or_shape_fails():
    eager, exact = results()
    with pytest.raises(AssertionError, match="dtype"):
        assert_accurate(eager.double(), exact, eager)
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate(eager[:-1], exact, eager)
