"""What the benches know of an op: the sizes of a preset, the op at these sizes, and what the instruments ask of it."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmask.diffusion.masking import kept_count
from fastmask.kernels import Mask, sample_mask
from fastmask.models.maskdit import MaskDiTConfig
from fastmask.presets import PRESETS
from fastmask.training.config import TrainConfig, preset_config

CPU_BATCH = 4
# Widths of the presets' networks, the digits' first, and of PixArt and Flux.
ENCODERS = (96, 384, 768, 1024, 1152, 1280)
DECODERS = (64, 192, 384, 512)
WIDTHS = tuple(sorted({*ENCODERS, *DECODERS, 1536, 2304, 3072}))
DIRECTIONS = ("forward", "forward_backward")
Call = Callable[..., Any]


class Shapes(NamedTuple):
    """The sizes of a preset's network and batch, and the device and generator of tensors.

    On the device "meta" tensors have no data, and the generator is None.
    """

    preset: str
    device: torch.device
    dtype: torch.dtype
    batch: int
    length: int
    keep: int
    width: int
    heads: int
    decoder_width: int
    channels: int
    patch: int
    side: int
    generator: torch.Generator | None

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal random numbers, in the matmul dtype by default."""
        made = torch.randn(shape, device=self.device, generator=self.generator)
        return made.to(dtype or self.dtype)

    def images(self) -> Tensor:
        """Return a batch of noised images, fp32."""
        return self.normal(self.batch, self.channels, self.side, self.side, dtype=torch.float32)

    def scalar(self, value: float) -> Tensor:
        """Return a tensor of shape (): fp32, or int64 for an int."""
        return torch.tensor(value, device=self.device)

    def mask(self) -> Mask:
        """Return a mask of the batch, with equal numbers of kept positions."""
        return sample_mask(self.batch, self.length, self.keep, seed=7, device=self.device, impl="reference")

    def cu_seqlens(self, counts: list[int] | None = None) -> Tensor:
        """Return the boundaries of packed samples; of ``keep`` rows each by default."""
        counts = counts or [self.keep] * self.batch
        return torch.tensor([0, *counts], dtype=torch.int32, device=self.device).cumsum(0, dtype=torch.int32)


class Op(NamedTuple):
    """An op at one shape.

    Attributes:
        name: name of the public function.
        shape: shape for tables, such as "B=128 K=128 D=1152".
        inputs: input tensors by argument name.
        leaves: names of the inputs that get a gradient.
        again: names of the inputs that the gradients depend on, which backward has to read.
        reference: the plain PyTorch implementation; takes the inputs and the options.
        fused: our implementation, or the reason why the op does not support these tensors.
        kernel: prefix of its kernels' names; empty if it has no kernels of its own.
        options: other arguments.
        others: implementations of other libraries, or the reason why one is missing.
        part: fraction of an input that is read, if not all of it.
        statistics: bytes that forward keeps for backward, besides inputs and results.
        unread: names of inputs that backward's launch takes but does not read here.
        flops: matmul FLOPs of forward.
        backward_flops: matmul FLOPs of backward.
        compile_on_cpu: compile forward+backward on a CPU too, which takes half a minute.
        host: variants that synchronise with the device and cannot be captured in a CUDA graph.
        in_place: the calls modify their inputs, so they are checked on copies.
    """

    name: str
    shape: str
    inputs: dict[str, Tensor]
    leaves: tuple[str, ...]
    again: tuple[str, ...]
    reference: Call
    fused: Call | str
    kernel: str
    options: Mapping[str, Any] = {}
    others: Mapping[str, Call | str] = {}
    part: Mapping[str, float] = {}
    statistics: int = 0
    unread: tuple[str, ...] = ()
    flops: int = 0
    backward_flops: int = 0
    compile_on_cpu: bool = False
    host: tuple[str, ...] = ()
    in_place: bool = False

    def tracked(self) -> dict[str, Tensor]:
        """Return the inputs, with leaves that require a gradient."""
        return {name: t.detach().requires_grad_() if name in self.leaves else t for name, t in self.inputs.items()}

    def min_bytes(self, results: tuple[Tensor, ...]) -> tuple[int, int]:
        """Return the minimum traffic of forward and backward.

        Forward: every input and result once. Backward: the gradients of the results, the inputs that the derivative
        depends on, and the gradients of the leaves.
        """
        read = {name: t.nbytes * self.part.get(name, 1) for name, t in self.inputs.items()}
        written = sum(result.nbytes for result in results)
        backward = written + sum(read[name] for name in self.again)
        backward += sum(self.inputs[name].nbytes for name in self.leaves)
        return int(sum(read.values()) + written), int(backward)


Make = Callable[[Shapes], Op]


class Description(NamedTuple):
    """An op of `fastmask.kernels` as described by its file.

    Attributes:
        forms: the op at the sizes of a preset, by the name of its form; checked, timed and run by the campaign.
        directions: "forward" (without autograd) and "forward_backward", or the first alone.
        counted: the op whose traffic `bench.instruments.traffic` counts; None: it is not counted.
        launches: yields labelled ops on tensors without data, which other networks and dtypes launch than the presets',
            for `bench.instruments.compile`; it takes the widths to compile for.
        narrow: the allowed number of loads of less than 128 bits, for scalars, by kernel; any in kernels without one.
    """

    forms: Mapping[str, Make]
    directions: tuple[str, ...] = DIRECTIONS
    counted: Make | None = None
    launches: Callable[[list[int]], Iterator[tuple[str, Op]]] = lambda widths: iter(())
    narrow: Mapping[str, int] = {}


def absent(module: str, how: str, device: torch.device) -> str:
    """Return why a GPU library is unavailable, and how to install it; empty if it is available."""
    if importlib.util.find_spec(module.split(".")[0]) is None:
        return f"not installed: {how}"
    return "" if device.type == "cuda" else f"runs on a GPU, not on {device.type}"


def pixels_of(config: TrainConfig) -> tuple[int, int]:
    """Return channels and side of what a configuration's network takes: latents, or the digits' pixels."""
    return (1, config.data.image_size) if config.data.data == "digits" else (4, config.data.image_size // 8)


def shapes_of(preset: str, device: torch.device, dtype: torch.dtype | None = None) -> Shapes:
    """Return the shapes of a preset: its micro-batch, or four images on a CPU.

    Args:
        preset: a masked preset; a ValueError otherwise.
        device: device of the tensors.
        dtype: matmul dtype; None is bfloat16, and float32 on a CPU.
    """
    config = preset_config(preset, PRESETS)
    if not isinstance(config.network, MaskDiTConfig) or not config.network.masked:
        raise ValueError(f"preset {preset} has no masks and no decoder to take shapes from: give a masked one")
    on_cpu = device.type == "cpu"
    channels, side = pixels_of(config)
    length = (side // config.network.patch_size) ** 2
    return Shapes(
        preset=preset,
        device=device,
        dtype=dtype or (torch.float32 if on_cpu else torch.bfloat16),
        batch=CPU_BATCH if on_cpu else config.micro_batch,
        length=length,
        keep=kept_count(length, config.masking.mask_ratio),
        width=config.network.width,
        heads=config.network.num_heads,
        decoder_width=config.network.decoder_width,
        channels=channels,
        patch=config.network.patch_size,
        side=side,
        generator=None if device.type == "meta" else torch.Generator(device).manual_seed(0),
    )


# Of the networks that others launch: 128 images of 256 positions, half of them kept, and a patch of 2x2 latents.
_BARE = Shapes(
    "", torch.device("meta"), torch.bfloat16, batch=128, length=256, keep=128, width=1152, heads=16, decoder_width=512,
    channels=4, patch=2, side=32, generator=None,
)  # fmt: skip
_LARGEST = (_BARE.width, _BARE.decoder_width)


def bare_shapes(width: int) -> Iterator[tuple[str, Shapes]]:
    """Yield name and shapes without data of each matmul dtype, with this width of encoder and decoder.

    float16, which no preset uses by default, comes only with the widths of the largest preset.
    """
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("fp16", torch.float16)):
        if dtype != torch.float16 or width in _LARGEST:
            yield name, _BARE._replace(dtype=dtype, width=width, decoder_width=width)


def bare_layouts(width: int) -> Iterator[tuple[str, bool]]:
    """Yield the suffix of a label, and whether tokens are packed, which comes only with the largest preset's widths."""
    yield "", False
    if width in _LARGEST:
        yield " packed", True
