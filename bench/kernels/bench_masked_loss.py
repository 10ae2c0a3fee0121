"""masked_loss from the raw output tokens of all positions; images and noise are fp32."""

import torch

from bench.kernels._cases import Op, Shapes
from fastmask.diffusion import EDM
from fastmask.kernels import Mask, masked_loss, sample_mask
from fastmask.kernels.masked_loss import masked_loss_reference


def op(shapes: Shapes) -> Op:
    values = shapes.patch**2 * shapes.channels
    mask = sample_mask(shapes.batch, shapes.length, shapes.keep, seed=7, device=shapes.device, impl="reference")
    coefficients = EDM().coefficients(shapes.normal(shapes.batch, dtype=torch.float32).exp())
    names = ("c_skip", "c_out", "weight")

    def reference(ids_restore, **tensors):
        return masked_loss_reference(**tensors, mask=Mask(mask.ids_keep, ids_restore), patch_size=shapes.patch)

    def fused(ids_restore, **tensors):
        mask_of = Mask(mask.ids_keep, ids_restore)
        return masked_loss(**tensors, mask=mask_of, patch_size=shapes.patch, impl="fused")

    return Op(
        name="masked_loss",
        shape=f"B={shapes.batch} L={shapes.length} K={shapes.keep} P={values}",
        inputs={
            "raw": shapes.normal(shapes.batch, shapes.length, values),
            "images": shapes.images(),
            "noised": shapes.images(),
            **{name: getattr(coefficients, name) for name in names},
            "ids_restore": mask.ids_restore,
        },
        leaves=("raw",),
        again=("raw", "images", "noised", *names, "ids_restore"),
        reference=reference,
        fused=fused,
        kernel="masked_loss",
        compile_on_cpu=True,
    )


FORMS = {"masked": op}


def bench_masked_loss(kernel_case, timed):
    kernel_case.check()
    timed(kernel_case)
