"""restore_tokens at the decoder's input, as in the network and with the norm; gather_tokens of all positions."""

import functools

import torch

from bench.kernels._cases import Op, Shapes
from fastmask.kernels import gather_tokens, restore_tokens, sample_mask
from fastmask.kernels.restore_tokens import gather_tokens_reference, restore_tokens_reference


def restore(shapes: Shapes, norm: bool) -> Op:
    batch, width = shapes.batch, shapes.decoder_width
    modulation = {name: shapes.normal(batch, width) for name in ("shift", "scale")} if norm else {}
    return Op(
        name="restore_tokens",
        shape=f"B={batch} L={shapes.length} K={shapes.keep} E={width}{' norm' if norm else ''}",
        inputs={
            "x": shapes.normal(batch, shapes.keep, width),
            "mask_token": shapes.normal(width),
            "position": shapes.normal(shapes.length, width, dtype=torch.float32),
            "ids_restore": _mask(shapes).ids_restore,
            **modulation,
        },
        leaves=("x", "mask_token", *modulation),
        again=("ids_restore", *(("x", "mask_token", "position", "scale") if norm else ())),
        reference=restore_tokens_reference,
        fused=functools.partial(restore_tokens, impl="fused"),
        kernel="restore_tokens",
    )


def gather(shapes: Shapes) -> Op:
    return Op(
        name="gather_tokens",
        shape=f"B={shapes.batch} L={shapes.length} K={shapes.keep} D={shapes.width}",
        inputs={
            "x": shapes.normal(shapes.batch, shapes.length, shapes.width),
            "ids_keep": _mask(shapes).ids_keep,
        },
        leaves=("x",),
        again=("ids_keep",),
        reference=gather_tokens_reference,
        fused=functools.partial(gather_tokens, impl="fused"),
        kernel="gather_tokens",
        part={"x": shapes.keep / shapes.length},
    )


def _mask(shapes: Shapes):
    return sample_mask(shapes.batch, shapes.length, shapes.keep, seed=7, device=shapes.device, impl="reference")


FORMS = {
    "restore": functools.partial(restore, norm=False),
    "restore_norm": functools.partial(restore, norm=True),
    "gather": gather,
}


def bench_restore_tokens(kernel_case, timed):
    kernel_case.check()
    timed(kernel_case)
