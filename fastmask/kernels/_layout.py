"""Token layouts (dense and packed), argument checks, and broadcasting of modulations.

Dense tokens have shape (B, K, D). Packed tokens have shape (N, D): samples are concatenated, sample b in rows
cu_seqlens[b] .. cu_seqlens[b + 1] - 1, so they can keep unequal numbers of tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.kernels._dispatch import has_native

MAX_WIDTH = 8192
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


_debug = False


def debug_indices(enabled: bool = True) -> None:
    """Make the fused ops check the values of index lists and ``cu_seqlens``, with a ValueError for invalid ones.

    Off by default, since the check is a host sync on a GPU. On a CPU values are always checked; a native kernel checks
    index lists itself, with a RuntimeError. Under `torch.compile` and on fake tensors only native kernels check.
    """
    global _debug
    _debug = enabled


def native_rows(*tensors: Tensor | None) -> bool:
    """Return whether native kernels of rows take these tensors; their width is the last dimension of the first one."""
    given = [tensor for tensor in tensors if tensor is not None]
    width = given[0].shape[-1]
    return width % 8 == 0 and 0 < width <= MAX_WIDTH and all(is_supported(tensor.dtype) for tensor in given)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return whether any of these tensors requires a gradient under autograd."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def has_values(tensor: Tensor, *, anywhere: bool = False) -> bool:
    """Return whether the values of a tensor can be read on the host without (``anywhere``: or with) a device sync.

    False while torch.compile traces and for fake tensors, so that value checks stay out of graphs.
    """
    kind = tensor.device.type
    there = kind == "cpu" or (anywhere and kind != "meta")
    return there and type(tensor) is Tensor and not torch.compiler.is_compiling()


def check_index_range(name: str, ids: Tensor, limit: int, op: str) -> None:
    """Raise a ValueError for an index outside [0, ``limit``), if `_looks_at` is true."""
    if not _looks_at(ids, op):
        return
    bad = ids[(ids < 0) | (ids >= limit)]
    if bad.numel():
        raise ValueError(f"{name} of shape {tuple(ids.shape)} holds {int(bad[0])}, which is outside 0 .. {limit - 1}")


def check_permutations(name: str, ids: Tensor, op: str) -> None:
    """Raise a ValueError unless each row is a permutation of the positions, if `_looks_at` is true."""
    if not _looks_at(ids, op):
        return
    fits = (ids.sort(dim=1).values == torch.arange(ids.shape[1], device=ids.device)).all(1)
    if not fits.all():
        b = int((~fits).nonzero()[0])
        raise ValueError(f"{name} must be a permutation of 0 .. {ids.shape[1] - 1} for each sample, and {b}'s is none")


def _looks_at(ids: Tensor, op: str) -> bool:
    """Return whether to check index values: if `debug_indices` is on, or ``op`` runs interpreted on a CPU.

    Native kernels check them themselves.
    """
    return has_values(ids, anywhere=_debug) and (_debug or not has_native(op))


class Rows(NamedTuple):
    """Kernel view of tokens and modulations: groups of rows that share a modulation.

    Attributes:
        x: shape (N, D), contiguous.
        cu_seqlens: int32, shape (G + 1,), contiguous, the group boundaries; None: G groups of N / G rows each.
        modulations: each of shape (G, D), contiguous in the last dimension.
    """

    x: Tensor
    cu_seqlens: Tensor | None
    modulations: list[Tensor]


def check_tokens(name: str, x: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raise a ValueError unless ``x`` is (B, K, D), or (N, D) with int32 or int64 ``cu_seqlens`` (B + 1,)."""
    check_tensors(**{name: x, "cu_seqlens": cu_seqlens})
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
    """Raise a ValueError unless ``cu_seqlens`` is non-decreasing from 0 to ``num_rows``.

    Values are checked on a CPU at every call, and elsewhere if `debug_indices` is on; see `has_values`.

    Args:
        cu_seqlens: boundaries of packed samples, already passed to `check_cu_seqlens`.
        num_rows: N.
        what: description of the rows, for the message.
        most: maximum number of rows per sample; None: no limit.
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


def check_tensors(**tensors: Tensor | None) -> None:
    """Raise a ValueError for the first that is neither a tensor nor None, such as a numpy array or a list."""
    for name, given in tensors.items():
        if given is not None and not isinstance(given, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, not {type(given).__module__}.{type(given).__name__}")


def modulation_of(name: str, given: Tensor | None, x: Tensor, cu_seqlens: Tensor | None, neutral: float) -> Tensor:
    """Return a modulation per sample, (B, D), or per token, with the shape of ``x``.

    Args:
        name: of the argument, for the message.
        given: (B, D), (B, 1, D), per token, or one of all samples: (D,), (1, D) or (1, 1, D), whose gradient is summed
            in fp32; None is ``neutral``.
        x: the tokens.
        cu_seqlens: as in `check_tokens`.
        neutral: the value that changes nothing, 0 of shift and scale and 1 of gate.
    """
    batch, width = num_samples(x, cu_seqlens), x.shape[-1]
    if given is None:
        one = torch.full((width,), neutral, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        return one.expand(batch, width)
    if given.shape == (batch, width) or given.shape == x.shape:
        return given
    if given.shape == (batch, 1, width):
        return given.squeeze(1)
    if given.shape == (width,) or given.shape == (1, width) or given.shape == (1, 1, width):
        wide = given.to(torch.promote_types(given.dtype, torch.float32))
        return wide.reshape(width).expand(batch, width)
    is_per_sample(name, given, x, cu_seqlens)  # which says what fits
    return given


def is_per_sample(name: str, modulation: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Return whether a modulation is per sample, (B, D), rather than per token, with the shape of ``x``.

    If both shapes are equal (packed, one token per sample) it is per sample. Other shapes are a ValueError.
    """
    per_sample = (num_samples(x, cu_seqlens), x.shape[-1])
    if modulation.shape == per_sample:
        return True
    if modulation.shape == x.shape:
        return False
    raise ValueError(
        f"{name} must have shape {per_sample} or {tuple(x.shape)} for x of shape {tuple(x.shape)}, or broadcast to the "
        f"first, not {tuple(modulation.shape)}"
    )


def position_table(position: Tensor) -> Tensor:
    """Return a position table (1, L, D) as (L, D); other shapes are returned unchanged."""
    return position[0] if position.ndim == 3 and position.shape[0] == 1 else position


def sample_of_row(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """Return the sample index of each of N packed rows, int64 (N,), without a host sync."""
    row = torch.arange(num_rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)


def per_token(name: str, modulation: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return a modulation that broadcasts against the tokens."""
    if not is_per_sample(name, modulation, x, cu_seqlens):
        return modulation
    return modulation[:, None] if cu_seqlens is None else modulation[sample_of_row(cu_seqlens, x.shape[0])]


def as_rows(x: Tensor, cu_seqlens: Tensor | None, modulations: dict[str, Tensor]) -> Rows:
    """Return tokens and modulations as groups of rows.

    With per-sample modulations a group is a sample. If any modulation is per token, every row is a group, and
    per-sample modulations are expanded.

    Raises:
        ValueError: shapes that do not fit, or an unsupported dtype or width.
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
    """Raise a ValueError for the first that is no tensor or is on another device."""
    check_tensors(**others)
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {device}, like the rest, not on {tensor.device}")


def is_supported(dtype: torch.dtype) -> bool:
    """Return whether the kernels support a dtype."""
    return dtype in _DTYPES


def check_dtype(name: str, value: Tensor | torch.dtype) -> None:
    """Raise a ValueError for a dtype that the kernels do not support."""
    dtype = value.dtype if isinstance(value, Tensor) else value
    if not is_supported(dtype):
        raise ValueError(
            f'the fused kernels take float32, bfloat16 and float16, and {name} is {dtype}: impl="reference" '
            f"takes any floating dtype"
        )
