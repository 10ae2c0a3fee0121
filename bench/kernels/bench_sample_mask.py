"""sample_mask of a batch; it reads only the seed, and is not differentiable."""

import torch

from bench.kernels._cases import Op, Shapes
from fastmask.kernels import sample_mask
from fastmask.kernels.sample_mask import sample_mask_reference

DIRECTIONS = ("forward",)


def op(shapes: Shapes) -> Op:
    counts = shapes.batch, shapes.length, shapes.keep

    def drawn(function, **options):
        # A seed on the device, as in a captured training step.
        return lambda seed: function(*counts, seed=seed, device=shapes.device, **options)[:2]

    return Op(
        name="sample_mask",
        shape=f"B={shapes.batch} L={shapes.length} K={shapes.keep}",
        inputs={"seed": torch.tensor(7, device=shapes.device)},
        leaves=(),
        again=(),
        reference=drawn(sample_mask_reference),
        fused=drawn(sample_mask, impl="fused"),
        kernel="sample_mask",
    )


FORMS = {"equal": op}


def bench_sample_mask(kernel_case, timed):
    kernel_case.check()
    timed(kernel_case)
