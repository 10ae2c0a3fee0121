"""Kernels of `gelu_linear`: elementwise over flat blocks.

Backward returns the gradient of GELU and, from the same read, its recomputed value for the weight gradient.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 2048
_NUM_WARPS = 4


@triton.jit
def _tanh_parts(b_x):
    """Return tanh(sqrt(2 / pi) (x + 0.044715 x^3)) and the derivative of its argument."""
    inner = 0.7978845608028654 * (b_x + 0.044715 * b_x * b_x * b_x)
    derivative = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * b_x * b_x)
    # tanh(y) = 2 sigmoid(2 y) - 1, without overflow or libdevice.
    return 2.0 * tl.sigmoid(2.0 * inner) - 1.0, derivative


@triton.jit
def _gelu_fwd_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < size
    b_x = tl.load(x_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_tanh, _ = _tanh_parts(b_x)
    tl.store(out_ptr + o_x, (0.5 * b_x * (1.0 + b_tanh)).to(out_ptr.dtype.element_ty), mask=m_x)


@triton.jit
def _gelu_bwd_kernel(grad_ptr, x_ptr, grad_x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < size
    b_x = tl.load(x_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_grad = tl.load(grad_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_tanh, b_derivative = _tanh_parts(b_x)
    b_slope = 0.5 * (1.0 + b_tanh) + 0.5 * b_x * (1.0 - b_tanh * b_tanh) * b_derivative
    tl.store(grad_x_ptr + o_x, (b_grad * b_slope).to(grad_x_ptr.dtype.element_ty), mask=m_x)
    tl.store(out_ptr + o_x, (0.5 * b_x * (1.0 + b_tanh)).to(out_ptr.dtype.element_ty), mask=m_x)


def launch_fwd(x, out_dtype=None):
    """Return gelu(x), by default in the dtype of ``x``."""
    out = torch.empty_like(x, dtype=out_dtype)
    _gelu_fwd_kernel[(triton.cdiv(x.numel(), _BLOCK),)](x, out, x.numel(), BLOCK=_BLOCK, num_warps=_NUM_WARPS)
    return out


def launch_bwd(grad, x):
    """Return the gradient of x, and the recomputed gelu(x) in the dtype of ``grad``."""
    grad_x, out = torch.empty_like(x), torch.empty_like(grad)
    grid = (triton.cdiv(x.numel(), _BLOCK),)
    _gelu_bwd_kernel[grid](grad, x, grad_x, out, x.numel(), BLOCK=_BLOCK, num_warps=_NUM_WARPS)
    return grad_x, out
