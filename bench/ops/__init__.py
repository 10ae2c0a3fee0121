"""One description per op, `bench/ops/<op>.py`, which all instruments read.

    describe("modulate_norm").forms["layer"](shapes_of("xl2-in256", device))

is the op at a preset's shapes on any device: its inputs, reference, fused form, minimum traffic and other libraries'
implementations. Accuracy, timing, traffic, ahead-of-time compilation, tuning and the campaign take it from there.
"""

import importlib

from bench.ops._description import WIDTHS, Description, Op, Shapes, pixels_of, shapes_of

__all__ = ["OPS", "WIDTHS", "Description", "Op", "Shapes", "describe", "pixels_of", "shapes_of"]

# In the order in which the campaign measures them.
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


def describe(op: str) -> Description:
    """Return the description of one of `OPS`; a ValueError for another name."""
    if op not in OPS:
        raise ValueError(f"no kernel bench of {op!r}: choose from {', '.join(OPS)}")
    found: Description = importlib.import_module(f"bench.ops.{op}").DESCRIPTION
    return found
