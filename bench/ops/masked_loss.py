"""masked_loss from the raw output tokens of all positions; images and noise are fp32."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.ops._description import Description, Op, Shapes, bare_shapes
from fastmask.diffusion import EDM
from fastmask.kernels import Mask, masked_loss
from fastmask.kernels.masked_loss import masked_loss_reference

COEFFICIENTS = ("c_skip", "c_out", "weight")


def op(shapes: Shapes, masked: bool = True) -> Op:
    values = shapes.patch**2 * shapes.channels
    coefficients = EDM().coefficients(shapes.normal(shapes.batch, dtype=torch.float32).exp())

    def of_mask(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def call(ids_restore: Tensor | None = None, **tensors: Tensor) -> Any:
            mask = None if ids_restore is None else Mask(ids_restore[:, : shapes.keep], ids_restore)
            return function(**tensors, mask=mask, patch_size=shapes.patch, **options)

        return call

    ids = {"ids_restore": shapes.mask().ids_restore} if masked else {}
    return Op(
        name="masked_loss",
        shape=f"B={shapes.batch} L={shapes.length} K={shapes.keep} P={values}",
        inputs={
            "raw": shapes.normal(shapes.batch, shapes.length, values),
            "images": shapes.images(),
            "noised": shapes.images(),
            **{name: getattr(coefficients, name) for name in COEFFICIENTS},
            **ids,
        },
        leaves=("raw",),
        again=("raw", "images", "noised", *COEFFICIENTS, *ids),
        reference=of_mask(masked_loss_reference),
        fused=of_mask(masked_loss, impl="fused"),
        kernel="masked_loss",
        compile_on_cpu=True,
    )


def launches(widths: list[int]) -> Iterator[tuple[str, Op]]:
    """Latents of 256x256 and 512x512 images, and larger patches of pixels."""
    for patch, channels, side in ((2, 4, 32), (2, 4, 64), (8, 3, 64)):
        length = (side // patch) ** 2
        sizes = {"patch": patch, "channels": channels, "side": side, "length": length, "keep": length // 2}
        for dtype, shapes in bare_shapes(1152):
            for masked in (True, False):
                yield f"L={length} P={patch**2 * channels} {dtype}", op(shapes._replace(**sizes), masked)


DESCRIPTION = Description(forms={"masked": op}, counted=op, launches=launches)
