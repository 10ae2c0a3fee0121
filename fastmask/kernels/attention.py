"""Softmax attention within each sample, per head.

    weights = softmax(q k^T / sqrt(D/H)),  out = weights v

Backward, with g = grad_out and without the factor 1 / sqrt(D/H) of the last two:

    grad_v      = weights^T g
    grad_scores = weights * (g v^T - sum of g v^T * weights over the keys)
    grad_q      = grad_scores k,  grad_k = grad_scores^T q

This library has no attention kernel of its own; this file dispatches to existing ones. torch and flash-attn keep q, k,
v, the result and a log-sum-exp per head and token for backward, without copies: q, k and v can be views of one tensor.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmask.kernels._asked import only_asked
from fastmask.kernels._attention_backends import AttentionBackend, attention_backends, call, refusal, sample_lengths
from fastmask.kernels._dispatch import BackendUnavailableError, Impl, check_impl, chosen_impl, public_op, transformed
from fastmask.kernels._layout import check_bounds, check_cu_seqlens, check_devices, check_tensors

__all__ = ["AttentionBackend", "attention", "attention_backends", "attention_reference"]

AttentionName = Literal["torch", "flash-attn", "xformers", "reference"]


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
) -> Tensor:
    """Reference for `attention` in plain PyTorch, packed samples one by one; same arguments."""
    if cu_seqlens is None:
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    lengths = sample_lengths(cu_seqlens, q.shape[0], max_seqlen)
    samples = zip(q.split_with_sizes(lengths), k.split_with_sizes(lengths), v.split_with_sizes(lengths), strict=True)
    return torch.cat([attention_reference(*(t[None] for t in sample))[0] for sample in samples])


def _packed_fwd(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        return attention_reference(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)


def _packed_bwd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, asked: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = sample_lengths(cu_seqlens, q.shape[0])
    samples = zip(*(t.split_with_sizes(lengths) for t in (grad, q, k, v)), strict=True)
    with torch.autocast(q.device.type, enabled=False):
        grad_q, grad_k, grad_v = zip(*(_sample_bwd(sample, asked) for sample in samples), strict=True)
    return torch.cat(grad_q), torch.cat(grad_k), torch.cat(grad_v)


def _sample_bwd(sample: Sequence[Tensor], asked: Sequence[bool]) -> tuple[Tensor, ...]:
    """Return the gradients of one sample's q, k and v, empty where not asked for; computed in fp32 (or float64).

    Args:
        sample: the gradient of the result, q, k and v, all (K, H, D/H).
        asked: whether the gradients of q, k and v are computed.
    """
    dtype, scale = sample[1].dtype, sample[1].shape[-1] ** -0.5
    grad, q, k, v = (t.transpose(0, 1).to(torch.promote_types(dtype, torch.float32)) for t in sample)
    of_q, of_k, of_v = asked
    weights = (q @ k.mT * scale).softmax(-1)
    grad_q = grad_k = grad_v = q.new_empty(0, 0)
    if of_q or of_k:
        grad_weights = grad @ v.mT
        grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True)) * scale
        grad_q = grad_scores @ k if of_q else grad_q
        grad_k = grad_scores.mT @ q if of_k else grad_k
    if of_v:
        grad_v = weights.mT @ grad
    return tuple(t.transpose(0, 1).to(dtype) for t in (grad_q, grad_k, grad_v))


def _bwd_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, asked: Sequence[bool]
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape if wanted else (0, 0)) for t, wanted in zip((q, k, v), asked, strict=True))


# Registered as ops because reading cu_seqlens on the host cannot be traced.
torch.library.define(
    "fastmask::packed_attention_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt? max_seqlen) -> Tensor",
)
torch.library.define(
    "fastmask::packed_attention_bwd",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, bool[] asked) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("fastmask::packed_attention_fwd", ("cpu", "cuda"), _packed_fwd)
torch.library.impl("fastmask::packed_attention_bwd", ("cpu", "cuda"), _packed_bwd)
torch.library.register_fake("fastmask::packed_attention_fwd", lambda q, *_: q.new_empty(q.shape))
torch.library.register_fake("fastmask::packed_attention_bwd", _bwd_fake)
packed_attention_fwd = torch.ops.fastmask.packed_attention_fwd.default
packed_attention_bwd = torch.ops.fastmask.packed_attention_bwd.default


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> Tensor:
        of_q, of_k, _ = ctx.needs_input_grad[:3]
        ctx.save_for_backward(q, k, v if of_q or of_k else None, cu_seqlens)
        out: Tensor = packed_attention_fwd(q, k, v, cu_seqlens, max_seqlen)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cu_seqlens = ctx.saved_tensors
        asked = ctx.needs_input_grad[:3]
        # v is read for the gradients of q and k alone, and has the shape of q.
        grads = packed_attention_bwd(grad, q, k, q if v is None else v, cu_seqlens, list(asked))
        return *only_asked(asked, grads), None, None


@public_op(otherwise="PyTorch or another library, see attention_backends()")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    backend: AttentionName | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Return softmax attention within each sample.

    Equivalent PyTorch, for dense tokens: ``F.scaled_dot_product_attention`` with the head dimension before the token
    dimension. Differentiable in q, k and v. On a GPU gradients can differ in the last bits from run to run, unless
    ``torch.use_deterministic_algorithms(True)`` is set (xformers has no such mode).

    Args:
        q: queries, shape (B, K, H, D/H), or (N, H, D/H) with ``cu_seqlens``; any strides.
        k: keys, same shape and dtype as ``q``.
        v: values, same shape and dtype as ``q``.
        cu_seqlens: int32 (int64 is converted), shape (B + 1,), non-decreasing from 0 to N: boundaries of packed
            samples. Values are checked on a CPU, and on a GPU where they are read on the host, outside torch.compile.
        max_seqlen: upper bound of the length of packed samples; None is N, which is valid but slower on a GPU.
        backend: None for "torch" or "flash-attn", the first that supports the call; or one of:

            - "torch": dense: ``F.scaled_dot_product_attention``. Packed: ``torch.nn.attention.varlen`` on a GPU, for
              float16 and bfloat16 and head dimensions that are multiples of 8 up to 256; sample by sample on a CPU.
              ``torch.nn.attention.activate_flash_attention_impl`` makes both use version 3 or 4 of flash-attn.
            - "flash-attn": the newest installed version (4, 3 or 2) that supports the GPU; limits as above (version 4:
              head dimensions up to 128). torch.compile cannot trace version 4 here, but can through "torch".
            - "xformers": ``memory_efficient_attention``; packed, it reads ``cu_seqlens`` on the host, which is a host
              sync and cannot be traced.
            - "reference": plain PyTorch, any floating dtype. Packed: sample by sample, with a host sync.

            `attention_backends` lists the available ones.
        impl: "fused", a library chosen by ``backend``; "reference", same as ``backend="reference"``; None: chosen by
            ``backend``.

    Returns:
        Shape and dtype of ``q``.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown backend, or one that contradicts ``impl``.
        BackendUnavailableError: the backend is not installed or does not support these tensors.
    """
    _check(q, k, v, cu_seqlens)
    if backend not in (None, *get_args(AttentionName)):
        raise ValueError(f"backend must be None or one of {get_args(AttentionName)}, not {backend!r}")
    check_impl(impl)
    if impl is not None and backend is not None and (impl == "reference") != (backend == "reference"):
        raise ValueError(f'impl="{impl}" and backend="{backend}" contradict each other: leave one of them out')
    if backend is None and chosen_impl(impl) == "reference":
        backend = "reference"
    if transformed():
        if cu_seqlens is not None:
            raise ValueError("packed attention has no rules for torch.func and forward-mode AD: pass dense tokens")
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels of PyTorch have none either
            return attention_reference(q, k, v)
    reasons = []
    for name in ("torch", "flash-attn") if backend is None else (backend,):
        reason = refusal(name, q, packed=cu_seqlens is not None)
        if not reason:
            return _run(name, q, k, v, cu_seqlens, max_seqlen)
        reasons.append(reason)
    raise BackendUnavailableError(reasons[0])


def _run(name: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> Tensor:
    if cu_seqlens is None and name in ("torch", "reference"):
        return attention_reference(q, k, v)
    if cu_seqlens is not None and (name == "reference" or q.device.type != "cuda"):
        out: Tensor = _PackedAttention.apply(q, k, v, cu_seqlens, max_seqlen)  # type: ignore[no-untyped-call]
        return out
    return call(name, q, k, v, cu_seqlens, q.shape[0] if max_seqlen is None else max_seqlen)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    check_tensors(q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    shape = "(B, K, H, D/H)" if cu_seqlens is None else "(N, H, D/H) with cu_seqlens"
    if not q.shape == k.shape == v.shape or q.ndim != (4 if cu_seqlens is None else 3):
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"q, k and v must share one shape {shape}, not {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    check_devices(q.device, k=k, v=v, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens)
        check_bounds(cu_seqlens, q.shape[0], "rows of q")
