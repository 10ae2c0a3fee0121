import math

import pytest
import torch
from util import BF16_ROUNDING, relative_error

from fastmask.kernels import attention

# One token, odd sizes, a head of 72 as in XL.
SHAPES = [(2, 1, 2, 4), (3, 7, 3, 5), (1, 33, 2, 72)]


def attention_by_loops(q, k, v):
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = (q[b, :, h] @ k[b, :, h].T / math.sqrt(q.shape[3])).exp()
            out[b, :, h] = scores / scores.sum(1, keepdim=True) @ v[b, :, h]
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_and_fp64(shape):
    q, k, v = (torch.randn(shape) for _ in range(3))
    exact = attention_by_loops(q, k, v)
    out = attention(q, k, v)
    assert out.dtype == torch.float32
    assert relative_error(out, exact) < 1e-6
    assert relative_error(attention(q.double(), k.double(), v.double()), exact) < 1e-14


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16(shape):
    q, k, v = (torch.randn(shape).bfloat16() for _ in range(3))
    out = attention(q, k, v)
    assert out.dtype == torch.bfloat16
    # The weights are rounded before the second product, and the result after it.
    assert relative_error(out, attention_by_loops(q, k, v)) < BF16_ROUNDING


def test_strided_input():
    # The model passes slices of one (B, K, 3, H, D/H) tensor.
    q, k, v = torch.randn(2, 7, 3, 2, 4).unbind(2)
    assert not q.is_contiguous()
    assert relative_error(attention(q, k, v), attention_by_loops(q, k, v)) < 1e-6


def test_large_scores_do_not_overflow():
    q = torch.full((1, 3, 1, 4), 100.0)
    k = torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1) * q
    v = torch.randn(1, 3, 1, 4)
    assert torch.equal(attention(q, k, v), v[:, :1].expand_as(v))


def test_gradcheck():
    inputs = [torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(attention, inputs)


@pytest.mark.parametrize("shapes", [[(2, 3, 4)] * 3, [(2, 3, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4)]])
def test_shapes_that_differ_or_have_another_rank(shapes):
    with pytest.raises(ValueError, match=r"q, k and v must share one shape \(B, K, H, D/H\), not \(2, 3,"):
        attention(*(torch.zeros(shape) for shape in shapes))
