"""The launches of every Triton kernel, at the shapes of the presets, on tensors without data."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from fastmask.kernels._triton import add_gated_norm, gelu_linear, modulate_norm

# Encoders and decoders of the presets, then those of PixArt and Flux.
WIDTHS = (192, 384, 512, 768, 1024, 1152, 1280, 1536, 2304, 3072)
BATCH, TOKENS = 128, 128

FP32, BF16 = torch.float32, torch.bfloat16
Case = tuple[str, Callable[[], Any]]


class Spec(NamedTuple):
    """The launches of an op.

    Attributes:
        cases: yields a label and a call of a launcher for each width.
        wide: by kernel, whether it must load 128 bits at a time, and how many narrower loads (of scalars) it may have.
    """

    cases: Callable[[list[int]], Iterator[Case]]
    wide: dict[str, tuple[bool, int]]


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    """Return a tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _norm_cases(widths: list[int]) -> Iterator[Case]:
    rows = BATCH * TOKENS
    for width in widths:
        for name, low in (("bf16", BF16), ("fp32", FP32)):
            x, grad, stats = empty(rows, width), empty(rows, width, dtype=low), empty(2, rows)
            modulation = empty(BATCH, 6 * width, dtype=low)[:, :width]
            for rms in (False, True) if width == 3072 else (False,):  # SD3- and Flux-like models take RMS norms
                label = f"D={width} {name}{' rms' if rms else ''}"
                both = (modulation, modulation, None, rms)
                yield label, lambda a=(x, *both, 1e-6, low): modulate_norm.launch_fwd(*a)
                yield label, lambda a=(grad, x, stats, *both, True): modulate_norm.launch_bwd(*a)
                gated = (modulation, *both)
                yield label, lambda a=(x, grad, *gated, 1e-6, low): add_gated_norm.launch_fwd(*a)
                yield label, lambda a=(x, grad, x, stats, grad, *gated, True): add_gated_norm.launch_bwd(*a)


def _gelu_cases(widths: list[int]) -> Iterator[Case]:
    for name, dtype in (("bf16", BF16), ("fp32", FP32)):
        x = empty(BATCH * TOKENS, 4 * widths[0], dtype=dtype)
        yield name, lambda x=x: gelu_linear.launch_fwd(x)
        yield name, lambda x=x: gelu_linear.launch_bwd(x, x)


# Scalars of the row kernels: the two statistics of a row.
LAUNCHES = [
    Spec(
        _norm_cases,
        {
            "_modulate_norm_fwd_kernel": (True, 0),
            "_modulate_norm_bwd_kernel": (True, 2),
            "_add_gated_norm_fwd_kernel": (True, 0),
            "_add_gated_norm_bwd_kernel": (True, 2),
        },
    ),
    Spec(_gelu_cases, {"_gelu_fwd_kernel": (True, 0), "_gelu_bwd_kernel": (True, 0)}),
]
