"""add_gated_norm as in a block: fp32 residual, branch and modulations in the matmul dtype."""

import functools

import torch

from bench.kernels._cases import Op, Shapes
from fastmask.kernels import add_gated_norm
from fastmask.kernels.add_gated_norm import add_gated_norm_reference


def op(shapes: Shapes) -> Op:
    tokens = shapes.batch, shapes.keep, shapes.width
    gate, shift, scale = (shapes.normal(shapes.batch, shapes.width) for _ in range(3))
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
        compile_on_cpu=True,
    )


FORMS = {"layer": op}


def bench_add_gated_norm(kernel_case, timed):
    kernel_case.check()
    timed(kernel_case)
