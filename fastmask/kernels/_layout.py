"""The two layouts of tokens that every op takes, and how a modulation lies against them.

Dense tokens have shape (B, K, D). Packed tokens have shape (N, D): the samples stand one after the other, sample b in
rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1, so they may keep unequal numbers of tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._dispatch import _NATIVE_OPS

MAX_WIDTH = 8192
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


_debug = False


def debug_indices(enabled: bool = True) -> None:
    """Let the fused ops look at the values of index lists and ``cu_seqlens``, and raise a ValueError for what is wrong.

    Off by default, since a look makes every call wait for a GPU. On a CPU they always look; a native kernel looks at
    index lists by itself, and raises a RuntimeError. Not under `torch.compile` or on fake tensors, but that a native
    kernel still looks.
    """
    global _debug
    _debug = enabled


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return whether autograd would ask for the gradient of one of these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def has_values(tensor: Tensor, *, anywhere: bool = False) -> bool:
    """Return whether a tensor's values can be looked at without waiting for a device (``anywhere``: or with it).

    Not while torch.compile traces, nor of fake tensors, which have none: checks of values stay out of graphs.
    """
    kind = tensor.device.type
    there = kind == "cpu" or (anywhere and kind != "meta")
    return there and type(tensor) is Tensor and not torch.compiler.is_compiling()


def check_index_range(name: str, ids: Tensor, limit: int, op: str) -> None:
    """Raise a ValueError for an index outside [0, ``limit``), where `_looks_at` indices."""
    if not _looks_at(ids, op):
        return
    bad = ids[(ids < 0) | (ids >= limit)]
    if bad.numel():
        raise ValueError(f"{name} of shape {tuple(ids.shape)} holds {int(bad[0])}, which is outside 0 .. {limit - 1}")


def check_permutations(name: str, ids: Tensor, op: str) -> None:
    """Raise a ValueError unless each sample's row is a permutation of its positions, where `_looks_at` indices."""
    if not _looks_at(ids, op):
        return
    fits = (ids.sort(dim=1).values == torch.arange(ids.shape[1], device=ids.device)).all(1)
    if not fits.all():
        b = int((~fits).nonzero()[0])
        raise ValueError(f"{name} must be a permutation of 0 .. {ids.shape[1] - 1} for each sample, and {b}'s is none")


def _looks_at(ids: Tensor, op: str) -> bool:
    """Return whether indices are looked at: if `debug_indices` is on, or ``op`` runs interpreted on a CPU.

    A native kernel looks by itself.
    """
    return has_values(ids, anywhere=_debug) and (_debug or op not in _NATIVE_OPS)


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
    check_bounds(cu_seqlens, x.shape[0], f"rows of {name}")


def check_cu_seqlens(cu_seqlens: Tensor) -> None:
    """Raise a ValueError unless ``cu_seqlens`` is a vector of at least two int32 or int64 values."""
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be int32 or int64 of shape (B + 1,), not {cu_seqlens.dtype} of shape "
            f"{tuple(cu_seqlens.shape)}"
        )


def check_bounds(cu_seqlens: Tensor, num_rows: int, what: str, most: int | None = None) -> None:
    """Raise a ValueError unless the values of ``cu_seqlens`` rise from 0 to ``num_rows``.

    They are looked at on a CPU at every call, and elsewhere while `debug_indices` is on; see `has_values`.

    Args:
        cu_seqlens: where packed samples begin, as `check_cu_seqlens` leaves it.
        num_rows: N.
        what: the name of the rows.
        most: no sample may have more of them; None: any number.
    """
    if not has_values(cu_seqlens, anywhere=_debug):
        return
    rule = f"cu_seqlens must rise from 0 to the {num_rows} {what}"
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != num_rows:
        raise ValueError(f"{rule}, not from {first} to {last}")
    falls = (cu_seqlens[1:] < cu_seqlens[:-1]).nonzero()
    if falls.numel():
        b = int(falls[0])
        raise ValueError(f"{rule}, and it falls from {int(cu_seqlens[b])} to {int(cu_seqlens[b + 1])} at sample {b}")
    counts = cu_seqlens.diff()
    if most is not None and int(counts.max()) > most:
        b = int(counts.argmax())
        raise ValueError(f"cu_seqlens gives sample {b} {int(counts[b])} {what}, more than its {most} positions")


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
