"""sample_mask of a batch; it reads only the seed, and is not differentiable."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from bench.ops._description import Description, Op, Shapes, bare_shapes
from fastmask.kernels import sample_mask
from fastmask.kernels.sample_mask import sample_mask_reference


def op(shapes: Shapes) -> Op:
    counts = shapes.batch, shapes.length, shapes.keep

    def drawn(function: Callable[..., Any], **options: Any) -> Callable[[Tensor], tuple[Tensor, ...]]:
        # A seed on the device, as in a captured training step.
        return lambda seed: function(*counts, seed=seed, device=shapes.device, **options)[:2]

    return Op(
        name="sample_mask",
        shape=f"B={shapes.batch} L={shapes.length} K={shapes.keep}",
        inputs={"seed": shapes.scalar(7)},
        leaves=(),
        again=(),
        reference=drawn(sample_mask_reference),
        fused=drawn(sample_mask, impl="fused"),
        kernel="sample_mask",
    )


def launches(widths: list[int]) -> Iterator[tuple[str, Op]]:
    """The lengths of images of 256, 512 and 1024 pixels."""
    _, shapes = next(bare_shapes(max(widths)))
    for length in (256, 1024, 4096):
        yield f"L={length}", op(shapes._replace(length=length, keep=length // 2))


DESCRIPTION = Description(forms={"equal": op}, directions=("forward",), launches=launches)
