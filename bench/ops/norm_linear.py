"""modulated_linear for the first block's qkv, add_gated_linear for a block's fc1.

The weights are already in the matmul dtype, so autocast's casts are not timed. The kernels are those of the norms.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.ops._description import Description, Op, Shapes, bare_shapes
from fastmask.kernels import add_gated_linear, modulated_linear


def modulated(shapes: Shapes, **how: Any) -> Op:
    return _op(shapes, modulated_linear, "modulate_norm", ("shift", "scale"), 3 * shapes.width, **how)


def add_gated(shapes: Shapes, **how: Any) -> Op:
    return _op(shapes, add_gated_linear, "add_gated_norm", ("gate", "shift", "scale"), 4 * shapes.width, **how)


def _op(
    shapes: Shapes,
    function: Callable[..., Any],
    kernel: str,
    modulations: tuple[str, ...],
    out: int,
    norm: str = "layer",
    per_token: bool = False,
) -> Op:
    tokens, width = (shapes.batch, shapes.keep, shapes.width), shapes.width
    inputs = {"x": shapes.normal(*tokens, dtype=torch.float32)}
    if "gate" in modulations:
        inputs["branch"] = shapes.normal(*tokens)
    inputs |= {name: shapes.normal(*(tokens if per_token else (shapes.batch, width))) for name in modulations}
    inputs |= {"weight": shapes.normal(out, width) * width**-0.5, "bias": shapes.normal(out)}
    flops = 2 * shapes.batch * shapes.keep * width * out
    return Op(
        name=function.__name__,
        shape=f"B={shapes.batch} K={shapes.keep} D={width} E={out}",
        inputs=inputs,
        leaves=tuple(inputs),
        again=tuple(name for name in inputs if name != "bias"),
        reference=functools.partial(function, impl="reference"),
        fused=functools.partial(function, impl="fused"),
        kernel=kernel,
        options={"norm": norm},
        flops=flops,
        backward_flops=2 * flops,
    )


def launches(widths: list[int]) -> Iterator[tuple[str, Op]]:
    """Every width, RMS norms as in SD3- and Flux-like models, and a modulation per token."""
    for width in widths:
        for dtype, shapes in bare_shapes(width):
            for norm in ("layer", "rms") if width == 3072 else ("layer",):
                label = f"D={width} {dtype}{' rms' if norm == 'rms' else ''}"
                yield label, modulated(shapes, norm=norm)
                yield label, add_gated(shapes, norm=norm)
    width = max(widths)
    _, shapes = next(bare_shapes(width))
    yield f"D={width} per token", modulated(shapes._replace(batch=32), per_token=True)


DESCRIPTION = Description(forms={"modulated_linear": modulated, "add_gated_linear": add_gated}, launches=launches)
