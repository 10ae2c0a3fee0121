"""gelu_linear, the second half of a block's MLP, with the weight already in the matmul dtype."""

import functools
from collections.abc import Iterator

from bench.ops._description import Description, Op, Shapes, bare_shapes
from fastmask.kernels import gelu_linear
from fastmask.kernels.gelu_linear import gelu_linear_reference


def op(shapes: Shapes) -> Op:
    width, hidden = shapes.width, 4 * shapes.width
    flops = 2 * shapes.batch * shapes.keep * hidden * width
    return Op(
        name="gelu_linear",
        shape=f"B={shapes.batch} K={shapes.keep} D={hidden} E={width}",
        inputs={
            "x": shapes.normal(shapes.batch, shapes.keep, hidden),
            "weight": shapes.normal(width, hidden) * hidden**-0.5,
            "bias": shapes.normal(width),
        },
        leaves=("x", "weight", "bias"),
        again=("x", "weight"),
        reference=gelu_linear_reference,
        fused=functools.partial(gelu_linear, impl="fused"),
        kernel="gelu",
        flops=flops,
        backward_flops=2 * flops,
        compile_on_cpu=True,
    )


def launches(widths: list[int]) -> Iterator[tuple[str, Op]]:
    """Every dtype, at one width: the launches are the same at all."""
    for dtype, shapes in bare_shapes(1152):
        yield dtype, op(shapes)


DESCRIPTION = Description(forms={"mlp": op}, launches=launches, narrow={"_gelu_fwd_kernel": 0, "_gelu_bwd_kernel": 0})
