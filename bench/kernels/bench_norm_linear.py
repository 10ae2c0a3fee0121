"""modulated_linear for the first block's qkv, add_gated_linear for a block's fc1.

The weights are already in the matmul dtype, so autocast's casts are not timed.
"""

import functools

import torch

from bench.kernels._cases import Op, Shapes
from fastmask.kernels import add_gated_linear, modulated_linear


def modulated(shapes: Shapes) -> Op:
    return _op(shapes, modulated_linear, "modulate_norm", ("shift", "scale"), 3 * shapes.width)


def add_gated(shapes: Shapes) -> Op:
    return _op(shapes, add_gated_linear, "add_gated_norm", ("gate", "shift", "scale"), 4 * shapes.width)


def _op(shapes: Shapes, function, kernel: str, modulations: tuple[str, ...], out: int) -> Op:
    tokens, width = (shapes.batch, shapes.keep, shapes.width), shapes.width
    inputs = {"x": shapes.normal(*tokens, dtype=torch.float32)}
    if "gate" in modulations:
        inputs["branch"] = shapes.normal(*tokens)
    inputs |= {name: shapes.normal(shapes.batch, width) for name in modulations}
    inputs |= {"weight": shapes.normal(out, width) * width**-0.5, "bias": shapes.normal(out)}
    flops = 2 * shapes.batch * shapes.keep * width * out
    return Op(
        name=function.__name__,
        shape=f"B={shapes.batch} K={shapes.keep} D={width} E={out}",
        inputs=inputs,
        leaves=tuple(inputs),
        again=tuple(name for name in inputs if name != "bias"),
        reference=lambda **arguments: function(**arguments, impl="reference"),
        fused=functools.partial(function, impl="fused"),
        kernel=kernel,
        flops=flops,
        backward_flops=2 * flops,
    )


FORMS = {"modulated_linear": modulated, "add_gated_linear": add_gated}


def bench_norm_linear(kernel_case, timed):
    kernel_case.check()
    timed(kernel_case)
