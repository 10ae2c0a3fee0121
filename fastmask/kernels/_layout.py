"""The two layouts of tokens that every op takes, and how a modulation lies against them.

Dense tokens have shape (B, K, D). Packed tokens have shape (N, D): the samples stand one after the other, sample b in
rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1, so they may keep unequal numbers of tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MAX_WIDTH = 8192
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


_debug = False


def debug_indices(enabled: bool = True) -> None:
    """Let the fused ops look at the values of their index lists, and raise a ValueError for one out of range.

    Off by default, since a look makes every call wait for the device. Not under `torch.compile` or on fake tensors.
    """
    global _debug
    _debug = enabled


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return whether autograd would ask for the gradient of one of these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def check_index_range(name: str, ids: Tensor, limit: int) -> None:
    """Raise a ValueError for an index outside [0, ``limit``) while `debug_indices` is on."""
    if not _debug or type(ids) is not Tensor or torch.compiler.is_compiling():
        return
    bad = ids[(ids < 0) | (ids >= limit)]
    if bad.numel():
        raise ValueError(f"{name} of shape {tuple(ids.shape)} holds {int(bad[0])}, which is outside 0 .. {limit - 1}")


class Rows(NamedTuple):
    """Tokens and modulations as the kernels see them: groups of rows that share a modulation.

    Attributes:
        x: shape (N, D), contiguous.
        cu_seqlens: int32, shape (G + 1,), contiguous, where each group begins; None: all G groups are of N / G rows.
        modulations: each of shape (G, D), contiguous in the last dimension.
    """

    x: Tensor
    cu_seqlens: Tensor | None
    modulations: list[Tensor]


def check_tokens(name: str, x: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raise a ValueError unless ``x`` is (B, K, D), or (N, D) with int32 or int64 ``cu_seqlens`` (B + 1,)."""
    if cu_seqlens is None:
        if x.ndim != 3:
            raise ValueError(f"{name} must have shape (B, K, D), or (N, D) with cu_seqlens, not {tuple(x.shape)}")
        return
    if x.ndim != 2:
        raise ValueError(f"{name} must have shape (N, D) with cu_seqlens, not {tuple(x.shape)}")
    check_cu_seqlens(cu_seqlens)


def check_cu_seqlens(cu_seqlens: Tensor) -> None:
    """Raise a ValueError unless ``cu_seqlens`` is a vector of at least two int32 or int64 values."""
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be int32 or int64 of shape (B + 1,), not {cu_seqlens.dtype} of shape "
            f"{tuple(cu_seqlens.shape)}"
        )


def num_samples(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Return B."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def is_per_sample(name: str, modulation: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Return whether a modulation is per sample, (B, D), rather than per token, of the shape of ``x``.

    Packed tokens of which there are as many as samples fit both; it is then per sample. Others are a ValueError.
    """
    per_sample = (num_samples(x, cu_seqlens), x.shape[-1])
    if modulation.shape == per_sample:
        return True
    if modulation.shape == x.shape:
        return False
    raise ValueError(
        f"{name} must have shape {per_sample} or {tuple(x.shape)} for x of shape {tuple(x.shape)}, not "
        f"{tuple(modulation.shape)}"
    )


def position_table(position: Tensor) -> Tensor:
    """Return a position table (L, D), which may also be given as (1, L, D); others are returned as they are."""
    return position[0] if position.ndim == 3 and position.shape[0] == 1 else position


def sample_of_row(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """Return which sample each of N packed rows belongs to, int64 (N,), without looking at values on the host."""
    row = torch.arange(num_rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)


def per_token(name: str, modulation: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return a modulation in a form that broadcasts against the tokens."""
    if not is_per_sample(name, modulation, x, cu_seqlens):
        return modulation
    return modulation[:, None] if cu_seqlens is None else modulation[sample_of_row(cu_seqlens, x.shape[0])]


def as_rows(x: Tensor, cu_seqlens: Tensor | None, modulations: dict[str, Tensor]) -> Rows:
    """Return tokens and modulations as groups of rows.

    Modulations of every sample share their rows' group; per-token ones make each row a group of its own, and those that
    are per sample beside them are expanded.

    Raises:
        ValueError: shapes that do not fit, a dtype or a width that no kernel takes.
    """
    width = x.shape[-1]
    if width % 8 or not 8 <= width <= MAX_WIDTH:
        raise ValueError(
            f"the fused kernels take a width D that is a multiple of 8 up to {MAX_WIDTH}, not {width}; "
            f'impl="reference" takes any'
        )
    for name, tensor in {"x": x, **modulations}.items():
        check_dtype(name, tensor)
    shared = [is_per_sample(name, modulation, x, cu_seqlens) for name, modulation in modulations.items()]
    rows = x.reshape(-1, width).contiguous()
    values = list(modulations.values())
    if not all(shared):
        expanded = [
            per_token(name, modulation, x, cu_seqlens).expand(x.shape) for name, modulation in modulations.items()
        ]
        values = [modulation.reshape(-1, width) for modulation in expanded]
        cu_seqlens = None
    values = [value if value.stride(-1) == 1 else value.contiguous() for value in values]
    return Rows(rows, None if cu_seqlens is None else cu_seqlens.int().contiguous(), values)


def check_devices(device: torch.device, **others: Tensor | None) -> None:
    """Raise a ValueError that names the first tensor on another device."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {device}, like the rest, not on {tensor.device}")


def check_dtype(name: str, value: Tensor | torch.dtype) -> None:
    """Raise a ValueError for a dtype that no kernel takes."""
    dtype = value.dtype if isinstance(value, Tensor) else value
    if dtype not in _DTYPES:
        raise ValueError(
            f'the fused kernels take float32, bfloat16 and float16, and {name} is {dtype}: impl="reference" '
            f"takes any floating dtype"
        )
