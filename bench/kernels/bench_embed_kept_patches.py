"""embed_kept_patches as in the network, and with the first block's norm; images get no gradient, as in training."""

import functools

import torch

from bench.kernels._cases import Op, Shapes
from fastmask.kernels import embed_kept_patches, sample_mask
from fastmask.kernels.embed_kept_patches import embed_kept_patches_reference


def op(shapes: Shapes, norm: bool) -> Op:
    batch, width, patch = shapes.batch, shapes.width, shapes.patch
    values = patch * patch * shapes.channels
    modulation = {name: shapes.normal(batch, width) for name in ("shift", "scale")} if norm else {}
    flops = 2 * batch * shapes.keep * values * width
    mask = sample_mask(batch, shapes.length, shapes.keep, seed=7, device=shapes.device, impl="reference")
    inputs = {
        "images": shapes.images(),
        "weight": shapes.normal(width, shapes.channels, patch, patch) * values**-0.5,
        "bias": shapes.normal(width),
        "position": shapes.normal(shapes.length, width, dtype=torch.float32),
        "ids_keep": mask.ids_keep,
        "image_scale": shapes.normal(batch, dtype=torch.float32).exp(),
        **modulation,
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


FORMS = {"tokens": functools.partial(op, norm=False), "norm": functools.partial(op, norm=True)}


def bench_embed_kept_patches(kernel_case, timed):
    kernel_case.check()
    timed(kernel_case)
