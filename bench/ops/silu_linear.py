"""silu_linear, a block's adaLN modulation: one row per image, and the largest weight of the block."""

import functools

from bench.ops._description import Description, Op, Shapes
from fastmask.kernels import silu_linear
from fastmask.kernels.silu_linear import silu_linear_reference


def op(shapes: Shapes) -> Op:
    width, out = shapes.width, 6 * shapes.width
    flops = 2 * shapes.batch * out * width
    return Op(
        name="silu_linear",
        shape=f"B={shapes.batch} D={width} E={out}",
        inputs={
            "x": shapes.normal(shapes.batch, width),
            "weight": shapes.normal(out, width) * width**-0.5,
            "bias": shapes.normal(out),
        },
        leaves=("x", "weight", "bias"),
        again=("x", "weight"),
        reference=silu_linear_reference,
        fused=functools.partial(silu_linear, impl="fused"),
        kernel="",  # uses PyTorch's on a GPU
        flops=flops,
        backward_flops=2 * flops,
        compile_on_cpu=True,
    )


DESCRIPTION = Description(forms={"modulation": op})
