"""embed_kept_patches as in the network, and with the first block's norm; images get no gradient, as in training."""

import functools
import itertools
from collections.abc import Iterator

import torch

from bench.ops._description import ENCODERS, Description, Op, Shapes, bare_layouts, bare_shapes
from fastmask.kernels import embed_kept_patches
from fastmask.kernels.embed_kept_patches import embed_kept_patches_reference


def op(shapes: Shapes, norm: bool, packed: bool = False) -> Op:
    batch, width, patch = shapes.batch, shapes.width, shapes.patch
    values = patch * patch * shapes.channels
    modulation = {name: shapes.normal(batch, width) for name in ("shift", "scale")} if norm else {}
    flops = 2 * batch * shapes.keep * values * width
    ids_keep = shapes.mask().ids_keep
    inputs = {
        "images": shapes.images(),
        "weight": shapes.normal(width, shapes.channels, patch, patch) * values**-0.5,
        "bias": shapes.normal(width),
        "position": shapes.normal(shapes.length, width, dtype=torch.float32),
        "ids_keep": ids_keep.flatten() if packed else ids_keep,
        "image_scale": shapes.normal(batch, dtype=torch.float32).exp(),
        **modulation,
        **({"cu_seqlens": shapes.cu_seqlens()} if packed else {}),
    }
    return Op(
        name="embed_kept_patches",
        shape=f"B={batch} L={shapes.length} K={shapes.keep} P={values} D={width}{' norm' if norm else ''}",
        inputs=inputs,
        leaves=("weight", "bias", *modulation),
        again=("images", "ids_keep", "image_scale", *(("weight", "bias", "position", "scale") if norm else ())),
        reference=embed_kept_patches_reference,
        fused=functools.partial(embed_kept_patches, impl="fused"),
        kernel="embed_kept_patches",
        options={"patch_size": patch},
        part={"images": shapes.keep / shapes.length},
        flops=flops,
        backward_flops=flops,
    )


def launches(widths: list[int]) -> Iterator[tuple[str, Op]]:
    """The widths of encoders, larger patches of pixels at the largest preset's, and the gradient of the images."""
    for width in sorted({*widths} & {*ENCODERS}):
        for patch, channels, side in ((2, 4, 32), (8, 3, 64)) if width == 1152 else ((2, 4, 32),):
            for (dtype, shapes), (layout, packed) in itertools.product(bare_shapes(width), bare_layouts(width)):
                length = (side // patch) ** 2
                sizes = {"patch": patch, "channels": channels, "side": side, "length": length, "keep": length // 2}
                for norm in (False, True):
                    made = op(shapes._replace(**sizes), norm, packed)
                    label = f"D={width} p={patch} {dtype}{layout}"
                    yield label, made._replace(leaves=("images", "weight", "bias"))


DESCRIPTION = Description(
    forms={"tokens": functools.partial(op, norm=False), "norm": functools.partial(op, norm=True)},
    counted=functools.partial(op, norm=False),
    launches=launches,
)
