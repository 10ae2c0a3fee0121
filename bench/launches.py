"""The launches of every Triton kernel on tensors without data, for the presets and other networks.

`preset_launches` finds the launches of the presets' steps. This module lists further ones: the ops alone, as called by
other networks (PixArt, Flux) or other forms of the same network.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.preset_launches import preset_cases
from fastmask.kernels._triton import (
    adamw_ema,
    add_gated_norm,
    embed_kept_patches,
    gelu_linear,
    masked_loss,
    modulate_norm,
    restore_tokens,
    sample_mask,
)

# Widths of the presets' networks (the digits' first), and of PixArt and Flux.
ENCODERS = (96, 384, 768, 1024, 1152, 1280)
DECODERS = (64, 192, 384, 512)
WIDTHS = tuple(sorted({*ENCODERS, *DECODERS, 1536, 2304, 3072}))
BATCH, TOKENS = 128, 128

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
Case = tuple[str, Callable[[], Any]]


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    """Return a tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _dtypes(width: int) -> Iterator[tuple[str, torch.dtype]]:
    """Yield matmul dtypes; float16, which no preset uses by default, only for the widths of the largest preset."""
    yield "bf16", BF16
    yield "fp32", FP32
    if width in (1152, 512):
        yield "fp16", FP16


def _norm_cases(widths: list[int]) -> Iterator[Case]:
    rows = BATCH * TOKENS
    for width in widths:
        for name, low in _dtypes(width):
            x, grad, stats = empty(rows, width), empty(rows, width, dtype=low), empty(2, rows)
            modulation = empty(BATCH, 6 * width, dtype=low)[:, :width]
            for rms in (False, True) if width == 3072 else (False,):  # SD3- and Flux-like models use RMS norms
                label = f"D={width} {name}{' rms' if rms else ''}"
                both = (modulation, modulation, None, rms)
                yield label, lambda a=(x, *both, 1e-6, low): modulate_norm.launch_fwd(*a)
                yield label, lambda a=(grad, x, stats, *both, True): modulate_norm.launch_bwd(*a)
                gated = (modulation, *both)
                yield label, lambda a=(x, grad, *gated, 1e-6, low): add_gated_norm.launch_fwd(*a)
                yield label, lambda a=(x, grad, x, stats, grad, *gated, True): add_gated_norm.launch_bwd(*a)


def _per_token_cases(widths: list[int]) -> Iterator[Case]:
    """One row per group, as for per-token modulation and samples of a single token."""
    width = max(widths)
    x, low = empty(4096, width), empty(4096, width, dtype=BF16)
    label, stats, both = f"D={width} per token", empty(2, 4096), (low, low, None, False)
    yield label, lambda: modulate_norm.launch_fwd(x, *both, 1e-6, BF16)
    yield label, lambda: modulate_norm.launch_bwd(low, x, stats, *both, True)
    yield label, lambda: add_gated_norm.launch_fwd(x, low, low, *both, 1e-6, BF16)
    yield label, lambda: add_gated_norm.launch_bwd(None, low, x, stats, low, low, *both, False)


def _gelu_cases(widths: list[int]) -> Iterator[Case]:
    for name, dtype in _dtypes(1152):
        x = empty(BATCH * TOKENS, 4 * widths[0], dtype=dtype)
        yield name, lambda x=x: gelu_linear.launch_fwd(x)
        yield name, lambda x=x: gelu_linear.launch_bwd(x, x)


def _sample_mask_cases(widths: list[int]) -> Iterator[Case]:
    seed = empty(dtype=torch.int64)
    for length in (256, 1024, 4096):
        yield f"L={length}", lambda l=length: sample_mask.launch_fwd(seed, seed, None, BATCH, l, l // 2, 0)


def _layouts(width: int) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield label suffix and cu_seqlens of dense tokens and, at the widths of the largest preset, of packed tokens."""
    yield "", None
    if width in (1152, 512):
        yield " packed", empty(BATCH + 1, dtype=torch.int32)


def _embed_cases(widths: list[int]) -> Iterator[Case]:
    for width in sorted({*widths} & {*ENCODERS}):
        for patch, channels, side in ((2, 4, 32), (8, 3, 64)) if width == 1152 else ((2, 4, 32),):
            length = (side // patch) ** 2
            images, position = empty(BATCH, channels, side, side), empty(length, width)
            factor, tokens = empty(BATCH), empty(BATCH * length // 2, width)
            for (name, low), (layout, bounds) in itertools.product(_dtypes(width), _layouts(width)):
                weight, bias = empty(width, channels, patch, patch, dtype=low), empty(width, dtype=low)
                modulation = empty(BATCH, width, dtype=low)
                shape = (BATCH, length // 2) if bounds is None else (BATCH * length // 2,)
                ids, label = empty(*shape, dtype=torch.int32), f"D={width} p={patch} {name}{layout}"
                inputs = (images, weight, bias, position, ids, factor, bounds, low, FP32)
                for norm in (None, modulation):
                    options = (norm, norm, False, 1e-6)
                    yield label, lambda a=(*inputs, *options): embed_kept_patches.launch_fwd(*a)
                back = (tokens, images, weight, ids, factor, bounds, low)
                yield label, lambda a=back, d=low: embed_kept_patches.launch_bwd(*a, d)
                yield label, lambda a=back: embed_kept_patches.launch_bwd_images(*a)


def _restore_cases(widths: list[int]) -> Iterator[Case]:
    length, keep = 256, 128
    for width in sorted({*widths} & {*DECODERS}):
        position, ids = empty(length, width), empty(BATCH, length, dtype=torch.int32)
        restored = empty(BATCH * length, width)
        for (name, low), (layout, bounds) in itertools.product(_dtypes(width), _layouts(width)):
            x, token = empty(BATCH * keep, width, dtype=low), empty(width, dtype=low)
            modulation, label = empty(BATCH, width, dtype=low), f"D={width} {name}{layout}"
            for norm, through in ((None, None), (modulation, restored)):
                forward = (x, token, position, ids, bounds, norm, norm, False, 1e-6)
                yield label, lambda a=forward: restore_tokens.launch_fwd(*a)
                back = (restored, through, token, ids, bounds, BATCH * keep, low)
                yield label, lambda a=back: restore_tokens.launch_bwd(*a)
            shape = (BATCH, keep) if bounds is None else (BATCH * keep,)
            ids_keep, kept = empty(*shape, dtype=torch.int32), empty(*shape, width, dtype=low)
            whole = empty(BATCH, length, width, dtype=low)
            yield label, lambda a=(whole, ids_keep, bounds): restore_tokens.launch_gather_fwd(*a)
            yield label, lambda a=(kept, ids_keep, bounds, BATCH, length): restore_tokens.launch_gather_bwd(*a)


def _loss_cases(widths: list[int]) -> Iterator[Case]:
    for patch, channels, side in ((2, 4, 32), (2, 4, 64), (8, 3, 64)):
        length, values = (side // patch) ** 2, patch * patch * channels
        images, factor = empty(BATCH, channels, side, side), empty(BATCH)
        for name, low in _dtypes(1152):
            raw, label = empty(BATCH, length, values, dtype=low), f"L={length} P={values} {name}"
            for masked in (True, False):
                ids = empty(BATCH, length, dtype=torch.int32) if masked else None
                inputs = (raw, images, images, factor, factor, factor, ids, None, length // 2, patch)
                yield label, lambda a=inputs: masked_loss.launch_fwd(*a)
                yield label, lambda a=inputs, g=factor: masked_loss.launch_bwd(g, g, *a)


def _adamw_cases(widths: list[int]) -> Iterator[Case]:
    width = max(widths)
    params, steps = [empty(width, width), empty(width)], [empty(), empty()]
    copies = [empty(*p.shape, dtype=BF16) for p in params]
    one = empty()
    for averages, low in ((0, []), (1, []), (1, copies), (2, copies)):
        label = f"{averages} EMA{' bf16 copy' if low else ''}"
        lists = (params, params, params, params, params * averages, low, steps)
        scalars = (one, empty(averages), one, one, 0.9, 0.999, 1e-8, 0.01)
        yield label, lambda a=(*lists, *scalars): adamw_ema.launch(*a)


CASES: list[Callable[[list[int]], Iterator[Case]]] = [
    preset_cases,
    _norm_cases,
    _per_token_cases,
    _gelu_cases,
    _sample_mask_cases,
    _embed_cases,
    _restore_cases,
    _loss_cases,
    _adamw_cases,
]
# Row kernels must use 128-bit loads. By kernel: the allowed number of narrower loads, for scalars.
SCALARS = {
    "_modulate_norm_fwd_kernel": 0,
    "_modulate_norm_bwd_kernel": 2,  # the statistics of a row
    "_add_gated_norm_fwd_kernel": 0,
    "_add_gated_norm_bwd_kernel": 2,
    "_gelu_fwd_kernel": 0,
    "_gelu_bwd_kernel": 0,
    "_restore_tokens_fwd_kernel": 1,
    "_restore_tokens_bwd_kernel": 1,
    "_gather_tokens_kernel": 8,  # the compiler unrolls its loop, with an index per iteration
    "_adamw_ema_kernel": 16,  # table entries, bias corrections, EMA rates, and three for the step
}
