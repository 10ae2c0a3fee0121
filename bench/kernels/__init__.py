"""Kernel benchmarks against the reference, torch.compile and other libraries, at a preset's shapes.

There is a file per op, `bench_<op>.py`, run by `pytest bench/kernels --benchmark-only`; `cases` and `all_cases` provide
the same cases to other programs:

    for case in all_cases(device, "xl2-in256"):
        case.check()
        timings = rows.measure(case.variants, device)
        ... figures(case, timings, bandwidth) ...
"""

import importlib
from collections.abc import Iterator, Mapping

import torch

from bench.kernels._cases import DIRECTIONS, Case, case_of, figures, shapes_of

__all__ = ["OPS", "Case", "all_cases", "cases", "figures", "forms", "make", "shapes_of"]

OPS = (
    "modulate_norm",
    "add_gated_norm",
    "norm_linear",
    "gelu_linear",
    "silu_linear",
    "sample_mask",
    "embed_kept_patches",
    "restore_tokens",
    "masked_loss",
    "attention",
    "adamw_ema",
)


def forms(op: str) -> list[tuple[str, str]]:
    """Return the form and direction of each case of an op."""
    module = importlib.import_module(f"bench.kernels.bench_{op}")
    return [(form, direction) for form in module.FORMS for direction in getattr(module, "DIRECTIONS", DIRECTIONS)]


def make(
    op: str,
    form: str,
    direction: str,
    preset: str,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    compiler: bool = True,
    refused: Mapping[str, str] | None = None,
) -> Case:
    """Build one case; arguments as in `cases` and `case_of`."""
    shapes = shapes_of(preset, device, dtype)
    made = importlib.import_module(f"bench.kernels.bench_{op}").FORMS[form](shapes)
    return case_of(made, direction, shapes, compiler=compiler, refused=refused)


def cases(op: str, preset: str, device: torch.device, dtype: torch.dtype | None = None) -> Iterator[Case]:
    """Yield the cases of an op, its forms and directions; the tensors of each are allocated when it is reached.

    Args:
        op: one of `OPS`.
        preset: a masked preset, for the shapes.
        device: device of the tensors.
        dtype: matmul dtype; None is bfloat16 on a GPU and float32 on a CPU.
    """
    if op not in OPS:
        raise ValueError(f"no kernel bench of {op!r}: choose from {', '.join(OPS)}")
    for form, direction in forms(op):
        yield make(op, form, direction, preset, device, dtype)


def all_cases(device: torch.device, preset: str, dtype: torch.dtype | None = None) -> Iterator[Case]:
    """Yield the cases of every op; arguments as in `cases`."""
    for op in OPS:
        yield from cases(op, preset, device, dtype)
