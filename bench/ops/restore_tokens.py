"""restore_tokens at the decoder's input, as in the network and with the norm; gather_tokens of all positions."""

import functools
import itertools
from collections.abc import Iterator

import torch

from bench.ops._description import DECODERS, Description, Op, Shapes, bare_layouts, bare_shapes
from fastmask.kernels import gather_tokens, restore_tokens
from fastmask.kernels.restore_tokens import gather_tokens_reference, restore_tokens_reference


def restore(shapes: Shapes, norm: bool, packed: bool = False) -> Op:
    batch, width = shapes.batch, shapes.decoder_width
    modulation = {name: shapes.normal(batch, width) for name in ("shift", "scale")} if norm else {}
    x = shapes.normal(batch, shapes.keep, width)
    return Op(
        name="restore_tokens",
        shape=f"B={batch} L={shapes.length} K={shapes.keep} E={width}{' norm' if norm else ''}",
        inputs={
            "x": x.flatten(0, 1) if packed else x,
            "mask_token": shapes.normal(width),
            "position": shapes.normal(shapes.length, width, dtype=torch.float32),
            "ids_restore": shapes.mask().ids_restore,
            **modulation,
            **({"cu_seqlens": shapes.cu_seqlens()} if packed else {}),
        },
        leaves=("x", "mask_token", *modulation),
        again=("ids_restore", *(("x", "mask_token", "position", "scale") if norm else ())),
        reference=restore_tokens_reference,
        fused=functools.partial(restore_tokens, impl="fused"),
        kernel="restore_tokens",
    )


def gather(shapes: Shapes, packed: bool = False) -> Op:
    ids_keep = shapes.mask().ids_keep
    return Op(
        name="gather_tokens",
        shape=f"B={shapes.batch} L={shapes.length} K={shapes.keep} D={shapes.width}",
        inputs={
            "x": shapes.normal(shapes.batch, shapes.length, shapes.width),
            "ids_keep": ids_keep.flatten() if packed else ids_keep,
            **({"cu_seqlens": shapes.cu_seqlens()} if packed else {}),
        },
        leaves=("x",),
        again=("ids_keep",),
        reference=gather_tokens_reference,
        fused=functools.partial(gather_tokens, impl="fused"),
        kernel="gather_tokens",
        part={"x": shapes.keep / shapes.length},
    )


def launches(widths: list[int]) -> Iterator[tuple[str, Op]]:
    """The widths of decoders."""
    for width in sorted({*widths} & {*DECODERS}):
        for (dtype, shapes), (layout, packed) in itertools.product(bare_shapes(width), bare_layouts(width)):
            for made in (restore(shapes, False, packed), restore(shapes, True, packed), gather(shapes, packed)):
                yield f"D={width} {dtype}{layout}", made


DESCRIPTION = Description(
    forms={
        "restore": functools.partial(restore, norm=False),
        "restore_norm": functools.partial(restore, norm=True),
        "gather": gather,
    },
    counted=functools.partial(restore, norm=False),
    launches=launches,
    narrow={
        "_restore_tokens_fwd_kernel": 1,
        "_restore_tokens_bwd_kernel": 1,
        "_gather_tokens_kernel": 8,  # the compiler unrolls its loop, with an index per iteration
    },
)
