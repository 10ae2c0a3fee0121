"""The launches of every Triton kernel, at the shapes of the presets, on tensors without data."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

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

# Of the presets' networks, and of PixArt and Flux.
ENCODERS = (384, 768, 1024, 1152, 1280)
DECODERS = (192, 384, 512)
WIDTHS = tuple(sorted({*ENCODERS, *DECODERS, 1536, 2304, 3072}))
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


def _per_token_cases(widths: list[int]) -> Iterator[Case]:
    """One row per group, as per-token modulations and samples of a single token are launched."""
    width = max(widths)
    x, low = empty(4096, width), empty(4096, width, dtype=BF16)
    label, stats, both = f"D={width} per token", empty(2, 4096), (low, low, None, False)
    yield label, lambda: modulate_norm.launch_fwd(x, *both, 1e-6, BF16)
    yield label, lambda: modulate_norm.launch_bwd(low, x, stats, *both, True)
    yield label, lambda: add_gated_norm.launch_fwd(x, low, low, *both, 1e-6, BF16)
    yield label, lambda: add_gated_norm.launch_bwd(None, low, x, stats, low, low, *both, False)


def _gelu_cases(widths: list[int]) -> Iterator[Case]:
    for name, dtype in (("bf16", BF16), ("fp32", FP32)):
        x = empty(BATCH * TOKENS, 4 * widths[0], dtype=dtype)
        yield name, lambda x=x: gelu_linear.launch_fwd(x)
        yield name, lambda x=x: gelu_linear.launch_bwd(x, x)


def _sample_mask_cases(widths: list[int]) -> Iterator[Case]:
    seed = empty(dtype=torch.int64)
    for length in (256, 1024, 4096):
        yield f"L={length}", lambda l=length: sample_mask.launch_fwd(seed, seed, None, BATCH, l, l // 2, 0)


def _embed_cases(widths: list[int]) -> Iterator[Case]:
    for width in sorted({*widths} & {*ENCODERS}):
        for patch, channels, side in ((2, 4, 32), (8, 3, 64)) if width == 1152 else ((2, 4, 32),):
            length = (side // patch) ** 2
            images, position = empty(BATCH, channels, side, side), empty(length, width)
            ids, factor = empty(BATCH, length // 2, dtype=torch.int32), empty(BATCH)
            tokens = empty(BATCH * length // 2, width)
            for name, low in (("bf16", BF16), ("fp32", FP32)):
                weight, bias = empty(width, channels, patch, patch, dtype=low), empty(width, dtype=low)
                modulation = empty(BATCH, width, dtype=low)
                label = f"D={width} p={patch} {name}"
                inputs = (images, weight, bias, position, ids, factor, None, low, FP32)
                yield label, lambda a=inputs: embed_kept_patches.launch_fwd(*a, None, None, False, 1e-6)
                yield (
                    f"{label} norm",
                    lambda a=inputs, m=modulation: embed_kept_patches.launch_fwd(*a, m, m, False, 1e-6),
                )
                back = (tokens, images, weight, ids, factor, None, low)
                yield label, lambda a=back, d=low: embed_kept_patches.launch_bwd(*a, d)
                yield label, lambda a=back: embed_kept_patches.launch_bwd_images(*a)


def _restore_cases(widths: list[int]) -> Iterator[Case]:
    length, keep = 256, 128
    for width in sorted({*widths} & {*DECODERS}):
        position, ids = empty(length, width), empty(BATCH, length, dtype=torch.int32)
        restored = empty(BATCH * length, width)
        ids_keep = empty(BATCH, keep, dtype=torch.int32)
        for name, low in (("bf16", BF16), ("fp32", FP32)):
            x, token = empty(BATCH * keep, width, dtype=low), empty(width, dtype=low)
            modulation = empty(BATCH, width, dtype=low)
            label, inputs = f"D={width} {name}", (x, token, position, ids, None)
            yield label, lambda a=inputs: restore_tokens.launch_fwd(*a, None, None, False, 1e-6)
            yield f"{label} norm", lambda a=inputs, m=modulation: restore_tokens.launch_fwd(*a, m, m, False, 1e-6)
            back = (token, ids, None, BATCH * keep, low)
            yield label, lambda a=back, g=restored: restore_tokens.launch_bwd(g, None, *a)
            yield f"{label} norm", lambda a=back, g=restored: restore_tokens.launch_bwd(g, g, *a)
            whole, kept = empty(BATCH, length, width, dtype=low), empty(BATCH, keep, width, dtype=low)
            yield label, lambda a=(whole, ids_keep): restore_tokens.launch_gather_fwd(*a, None)
            yield f"{label} bwd", lambda a=(kept, ids_keep): restore_tokens.launch_gather_bwd(*a, None, BATCH, length)


def _loss_cases(widths: list[int]) -> Iterator[Case]:
    for patch, channels, side in ((2, 4, 32), (2, 4, 64), (8, 3, 64)):
        length, values = (side // patch) ** 2, patch * patch * channels
        images, sigma = empty(BATCH, channels, side, side), empty(BATCH)
        for name, low in (("bf16", BF16), ("fp32", FP32)):
            raw, label = empty(BATCH, length, values, dtype=low), f"L={length} P={values} {name}"
            for masked in (True, False):
                ids = empty(BATCH, length, dtype=torch.int32) if masked else None
                inputs = (raw, images, images, sigma, ids, None, length // 2, patch, 0.5)
                label = f"{label}{'' if masked else ' dense'}"
                yield label, lambda a=inputs: masked_loss.launch_fwd(*a)
                yield label, lambda a=inputs, g=sigma: masked_loss.launch_bwd(g, g, *a)


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


# The scalars that backward loads are the two statistics of a row.
_NORMS = {
    "_modulate_norm_fwd_kernel": (True, 0),
    "_modulate_norm_bwd_kernel": (True, 2),
    "_add_gated_norm_fwd_kernel": (True, 0),
    "_add_gated_norm_bwd_kernel": (True, 2),
}
LAUNCHES = [
    Spec(_norm_cases, _NORMS),
    Spec(_per_token_cases, _NORMS),
    Spec(_gelu_cases, {"_gelu_fwd_kernel": (True, 0), "_gelu_bwd_kernel": (True, 0)}),
    Spec(_sample_mask_cases, {}),
    Spec(_embed_cases, {}),
    Spec(
        _restore_cases,
        {
            "_restore_tokens_fwd_kernel": (True, 1),
            "_restore_tokens_bwd_kernel": (True, 1),
            "_gather_tokens_kernel": (True, 8),  # the compiler unrolls its loop, an index per turn
        },
    ),
    Spec(_loss_cases, {}),
    # The scalars are the table's, the corrections', the rates', and three of the step.
    Spec(_adamw_cases, {"_adamw_ema_kernel": (True, 16)}),
]
