"""add_gated_norm as in a block: fp32 residual, branch and modulations in the matmul dtype."""

import functools
from collections.abc import Iterator

import torch

from bench.ops._description import Description, Op, Shapes, bare_shapes
from fastmask.kernels import add_gated_norm
from fastmask.kernels.add_gated_norm import add_gated_norm_reference


def op(shapes: Shapes, per_token: bool = False) -> Op:
    tokens = shapes.batch, shapes.keep, shapes.width
    modulation = tokens if per_token else (shapes.batch, shapes.width)
    gate, shift, scale = (shapes.normal(*modulation) for _ in range(3))
    return Op(
        name="add_gated_norm",
        shape=f"B={shapes.batch} K={shapes.keep} D={shapes.width}",
        inputs={
            "x": shapes.normal(*tokens, dtype=torch.float32),
            "branch": shapes.normal(*tokens),
            "gate": gate,
            "shift": shift,
            "scale": scale,
        },
        leaves=("x", "branch", "gate", "shift", "scale"),
        again=("x", "branch", "gate", "scale"),  # in fact the new residual, which has the size of x
        reference=add_gated_norm_reference,
        fused=functools.partial(add_gated_norm, impl="fused"),
        kernel="add_gated_norm",
        options={"out_dtype": shapes.dtype},
        statistics=8 * shapes.batch * shapes.keep,
        unread=("shift",),
        compile_on_cpu=True,
    )


def launches(widths: list[int]) -> Iterator[tuple[str, Op]]:
    """A modulation per token, and no gradient of the residual, as after the last block; others are `norm_linear`'s."""
    width = max(widths)
    _, shapes = next(bare_shapes(width))
    per_token = op(shapes._replace(batch=32), per_token=True)
    yield f"D={width} per token", per_token._replace(fused=lambda **inputs: per_token.fused(**inputs)[1])


DESCRIPTION = Description(
    forms={"layer": op},
    counted=op,
    launches=launches,
    narrow={"_add_gated_norm_fwd_kernel": 0, "_add_gated_norm_bwd_kernel": 2},  # the statistics of a row
)
