"""Attention backends on a GPU: detection, supported inputs, calls.

A library is looked up at its first use and the result is cached for the lifetime of the process, so that torch.compile
can trace the calls. The calls match torch 2.11 to 2.13, flash-attn 2.8, flash-attn 3 (built from source), flash-attn-4
4.0.0b0 to b36, and xformers 0.0.35.
"""

import functools
import importlib
import importlib.metadata
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor


class AttentionBackend(NamedTuple):
    """Whether a library is usable on a device; `note` is its version, or why not and how to install it."""

    name: str
    usable: bool
    note: str


class _Library(NamedTuple):
    version: str
    module: Any
    widest_head: int


# Distribution, module, major compute capabilities, widest head; newest first. The distribution is needed because
# flash-attn 2.8 also ships a module flash_attn.cute, an early version with different arguments.
_FLASH_ATTN = (
    ("flash-attn-4", "flash_attn.cute", (9, 10), 128),
    ("flash-attn-3", "flash_attn_interface", (9,), 256),
    ("flash-attn", "flash_attn", (8, 9, 10, 11, 12), 256),
)
_ABSENT = {
    "flash-attn": "no flash-attn for this GPU is installed: pip install flash-attn-4 (compute capability 9 and 10), or "
    "pip install flash-attn --no-build-isolation (8 and later)",
    "xformers": "xformers is not installed: pip install xformers",
}
_DTYPES = {
    "torch": (torch.float16, torch.bfloat16),
    "flash-attn": (torch.float16, torch.bfloat16),
    "xformers": (torch.float16, torch.bfloat16, torch.float32),
}

_Function = TypeVar("_Function", bound=Callable[..., Any])

_found: dict[tuple[str, int], _Library] = {}


def attention_backends(device: torch.device | str) -> list[AttentionBackend]:
    """Return the attention backends on a device, in the order of preference of `attention`.

    xformers and the reference are used only on request: they read ``cu_seqlens`` on the host.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        names = ("torch", "flash-attn", "xformers", "reference")
        return [AttentionBackend(name, False, "no GPU in this machine") for name in names]
    rows = [AttentionBackend("torch", True, f"{torch.__version__}; packed tokens: {_packed_by_torch(device)}")]
    for name in ("flash-attn", "xformers"):
        reason = _missing(name, _arch(device)) if device.type == "cuda" else f"runs on a GPU, not on {device.type}"
        rows.append(AttentionBackend(name, not reason, reason or _found[name, _arch(device)].version))
    return [*rows, AttentionBackend("reference", True, "plain PyTorch; packed tokens: one sample after the other")]


def refusal(name: str, q: Tensor, packed: bool) -> str:
    """Return why a backend does not support ``q``, and an alternative; empty if it does."""
    kind = q.device.type
    if name in ("torch", "reference") and (not packed or kind in ("cpu", "meta")):
        return ""
    if kind != "cuda":
        return f'{name} runs on a GPU, not on {kind}: backend="torch" runs there'
    if name == "reference":
        return ""
    instead = f'backend="{"reference" if packed else "torch"}" takes any'
    if q.dtype not in _DTYPES[name]:
        taken = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES[name])
        return f"{name} takes {taken}{' for packed tokens' if packed else ''}, not {q.dtype}; {instead}"
    arch = _arch(q.device)
    missing: str = _missing(name, arch)
    if missing:
        return missing
    widest = _found[name, arch].widest_head
    if q.shape[-1] % 8 or q.shape[-1] > widest:
        return f"{name} takes heads of a multiple of 8 values up to {widest}, not {q.shape[-1]}; {instead}"
    return ""


def call(name: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> Tensor:
    """Compute attention on a GPU with a backend; `refusal` must have returned an empty string.

    Args:
        name: "torch" (packed only), "flash-attn" or "xformers".
        q: queries, (B, K, H, D/H), or (N, H, D/H) with ``cu_seqlens``.
        k: keys.
        v: values.
        cu_seqlens: sample boundaries; None for dense.
        max_seqlen: upper bound of the sample length.
    """
    module = _found[name, _arch(q.device)].module
    # Any strides are supported except in the last dimension.
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if name == "xformers":
        return _xformers(module, q, k, v, cu_seqlens)
    bounds = None if cu_seqlens is None else cu_seqlens.int().contiguous()
    if name == "flash-attn":
        return _flash_attn(module, q, k, v, bounds, max_seqlen)
    out: Tensor = module.varlen_attn(q, k, v, bounds, bounds, max_seqlen, max_seqlen)
    return out


def _flash_attn(module: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, max_seqlen: int) -> Tensor:
    # torch's own kernels follow this setting without an argument.
    deterministic = torch.are_deterministic_algorithms_enabled()
    if bounds is None:
        out = module.flash_attn_func(q, k, v, deterministic=deterministic)
    else:
        out = module.flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            deterministic=deterministic,
        )
    # Version 4, and some builds of version 3, also return the log-sum-exp.
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def _xformers(module: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    out: Tensor
    if cu_seqlens is None:
        out = module.memory_efficient_attention(q, k, v)
        return out
    lengths = sample_lengths(cu_seqlens, q.shape[0])
    bias = module.fmha.BlockDiagonalMask.from_seqlens(lengths, device=q.device)
    q, k, v = (t.unsqueeze(0) for t in (q, k, v))
    out = module.memory_efficient_attention(q, k, v, attn_bias=bias).squeeze(0)
    return out


def sample_lengths(cu_seqlens: Tensor, num_rows: int, max_seqlen: int | None = None) -> list[int]:
    """Return the length of each sample, read on the host.

    Raises:
        ValueError: ``cu_seqlens`` is not non-decreasing from 0 to N, or a sample is longer than ``max_seqlen``.
    """
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != num_rows or min(lengths) < 0:
        raise ValueError(f"cu_seqlens must rise from 0 to the {num_rows} rows of q, not {bounds}")
    if max_seqlen is not None and max(lengths) > max_seqlen:
        raise ValueError(f"max_seqlen must be at least the longest sample's {max(lengths)} tokens, not {max_seqlen}")
    return lengths


def _packed_by_torch(device: torch.device) -> str:
    if device.type != "cuda":
        return "one sample after the other"
    return _missing("torch", _arch(device)) or "torch.nn.attention.varlen"


def _constant_when_compiled(function: _Function) -> _Function:
    """Same as torch.compiler.assume_constant_result, which would import torch._dynamo and triton immediately."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_when_compiled
def _arch(device: torch.device) -> int:
    """Return the major compute capability; 0 without a GPU (for fake CUDA tensors)."""
    return torch.cuda.get_device_properties(device).major if torch.cuda.is_available() else 0


@_constant_when_compiled
def _missing(name: str, arch: int) -> str:
    """Return why a library is unavailable for a compute capability; if it is available, cache it and return ""."""
    return _look_for(name, arch)


@functools.cache
def _look_for(name: str, arch: int) -> str:
    if name == "torch":
        if arch and not (arch >= 8 and torch.backends.cuda.is_flash_attention_available()):
            return (
                "torch's packed attention needs compute capability 8 or later and a torch built with flash attention; "
                'backend="xformers" or "reference" does not'
            )
        # Imported late because it imports torch._dynamo, which takes longer than torch itself.
        _found[name, arch] = _Library(torch.__version__, importlib.import_module("torch.nn.attention.varlen"), 256)
        return ""
    candidates = _FLASH_ATTN if name == "flash-attn" else (("xformers", "xformers.ops", (arch,), 65536),)
    reason = _ABSENT[name]
    for distribution, module, archs, widest in candidates:
        if arch and arch not in archs:
            continue
        try:
            version = f"{distribution} {importlib.metadata.version(distribution)}"
        except importlib.metadata.PackageNotFoundError:
            continue
        try:
            _found[name, arch] = _Library(version, importlib.import_module(module), widest)
        except (ImportError, OSError) as error:
            reason = f"{version} cannot be imported: {(str(error) or type(error).__name__).splitlines()[0]}"
            continue
        return ""
    return reason
