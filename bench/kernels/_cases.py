"""Shared code of the kernel benchmarks: shapes of a preset, variants of an op, accuracy checks and figures.

A benchmark file describes its op once, as an `Op`; this module converts it to a `Case` per direction, ready to check
and time.
"""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import rows
from bench.kernels._gate import complaint
from bench.kernels._graph import Graphed
from fastmask.diffusion.masking import kept_count
from fastmask.kernels import backends
from fastmask.presets import PRESETS
from fastmask.training.config import preset_config

DIRECTIONS = ("forward", "forward_backward")
PRESET = {"cuda": "xl2-in256", "cpu": "b2-in256"}
CPU_BATCH = 4
Call = Callable[..., Any]


class Shapes(NamedTuple):
    """The sizes of a preset's network and batch, and the device and generator of tensors."""

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
    generator: torch.Generator

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal random numbers, in the matmul dtype by default."""
        made = torch.randn(shape, device=self.device, generator=self.generator)
        return made.to(dtype or self.dtype)

    def images(self) -> Tensor:
        """Return a batch of noised images, fp32."""
        return self.normal(self.batch, self.channels, self.side, self.side, dtype=torch.float32)


class Op(NamedTuple):
    """An op at one shape, as described by its benchmark file.

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
    flops: int = 0
    backward_flops: int = 0
    compile_on_cpu: bool = False
    host: tuple[str, ...] = ()
    in_place: bool = False


class Case(NamedTuple):
    """An op in one direction: its description for a row, the calls to time, and the check to pass first.

    Attributes:
        op: name of the public function.
        direction: "forward" (without autograd) or "forward_backward".
        dtype: matmul dtype, such as "bfloat16".
        shape: shape for tables.
        preset: origin of the shape.
        variants: calls without arguments, by name: "reference", "compiled", "ours" and other libraries'.
        missing: the reason for each missing variant, and how to install it.
        least_bytes: minimum traffic. Forward: every input and result once; backward: the gradients of the results, the
            inputs that the derivative depends on, and the gradients of inputs.
        flops: FLOPs of matmuls and attention; 0 if there are none.
        check: raises an AssertionError if one of the named variants, by default any, is inaccurate.
    """

    op: str
    direction: str
    dtype: str
    shape: str
    preset: str
    variants: dict[str, Callable[[], tuple[Tensor, ...]]]
    missing: dict[str, str]
    least_bytes: int
    flops: int
    check: Callable[..., None]


def shapes_of(preset: str, device: torch.device, dtype: torch.dtype | None = None) -> Shapes:
    """Return the shapes of a preset: its micro-batch on a GPU, four images on a CPU.

    Args:
        preset: a masked preset; a ValueError otherwise.
        device: device of the tensors.
        dtype: matmul dtype; None is bfloat16 on a GPU and float32 on a CPU.
    """
    config = preset_config(preset, PRESETS)
    if not config.network.decoder_depth:
        raise ValueError(f"preset {preset} has no masks and no decoder to take shapes from: give a masked one")
    on_gpu = device.type == "cuda"
    latents = config.data.data != "digits"  # the digits are pixels
    side = config.data.image_size // 8 if latents else config.data.image_size
    length = (side // config.network.patch_size) ** 2
    return Shapes(
        preset=preset,
        device=device,
        dtype=dtype or (torch.bfloat16 if on_gpu else torch.float32),
        batch=config.micro_batch if on_gpu else CPU_BATCH,
        length=length,
        keep=kept_count(length, config.masking.mask_ratio),
        width=config.network.width,
        heads=config.network.num_heads,
        decoder_width=config.network.decoder_width,
        channels=4 if latents else 1,
        patch=config.network.patch_size,
        side=side,
        generator=torch.Generator(device).manual_seed(0),
    )


def absent(module: str, how: str, device: torch.device) -> str:
    """Return why a GPU library is unavailable, and how to install it; empty if it is available."""
    if importlib.util.find_spec(module.split(".")[0]) is None:
        return f"not installed: {how}"
    return "" if device.type == "cuda" else f"runs on a GPU, not on {device.type}"


def compiled(function: Call, device: torch.device) -> Call:
    """Compile a function for one shape; a graph break is an error."""
    torch._dynamo.reset()  # otherwise dynamo stops compiling a function after a few shapes and dtypes
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"
    return torch.compile(function, mode=mode, dynamic=False, fullgraph=True)


def case_of(
    op: Op, direction: str, shapes: Shapes, *, compiler: bool = True, refused: Mapping[str, str] | None = None
) -> Case:
    """Build the case of an op in one direction.

    Args:
        op: the op at its shape.
        direction: one of `DIRECTIONS`.
        shapes: the shapes of the op.
        compiler: include the compiled reference, which takes by far the longest.
        refused: known reasons why a variant cannot be captured, by variant.
    """
    both = direction == "forward_backward"
    on_gpu = shapes.device.type == "cuda"
    with torch.no_grad():
        results = _tuple(op.reference(**_fresh(op), **op.options))
    grads = [shapes.normal(*result.shape, dtype=result.dtype) for result in results if result.is_floating_point()]

    # A function per variant, or the reason why it is missing.
    functions: dict[str, Call | str] = {"reference": op.reference}
    if compiler and (on_gpu or (both and op.compile_on_cpu)):
        functions["compiled"] = compiled(op.reference, shapes.device)
    elif compiler:
        functions["compiled"] = "on a CPU only forward+backward of the norms, the loss and gelu are, to save time"
    kernels = [row for row in backends() if row.device == shapes.device.type and row.op.startswith(op.kernel)]
    gaps = [row.reason for row in kernels if row.kernel == "none" and op.kernel]
    functions["ours"] = gaps[0] if gaps else op.fused
    functions |= op.others
    if not compiler:
        functions.pop("compiled", None)  # an op can have its own reason why it is missing

    variants: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    checked: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    for name, function in functions.items():
        if not isinstance(function, str):
            call = functools.partial(_run, function, op.inputs, op.options, op.leaves, grads if both else None)
            variants[name] = Graphed(call, (refused or {}).get(name, "")) if on_gpu and name not in op.host else call
            once = functools.partial(_run_fresh, function, op)
            checked[name] = once if op.in_place else variants[name]
    # Minimum traffic.
    needed = {name: t.nbytes * op.part.get(name, 1) for name, t in op.inputs.items()}
    written = sum(result.nbytes for result in results)
    least = sum(needed.values()) + written
    if both:
        least += written + sum(needed[name] for name in op.again) + sum(op.inputs[name].nbytes for name in op.leaves)
    return Case(
        op=op.name,
        direction=direction,
        dtype=str(shapes.dtype).removeprefix("torch."),
        shape=op.shape,
        preset=shapes.preset,
        variants=variants,
        missing={name: function for name, function in functions.items() if isinstance(function, str)},
        least_bytes=int(least),
        flops=op.flops + both * op.backward_flops,
        check=_Gate(op, direction, variants, checked, grads if both else None),
    )


def figures(case: Case, timings: dict[str, rows.Timing], bandwidth: float) -> dict[str, dict[str, Any]]:
    """Return the figures of each variant for a row.

    Args:
        case: the timed case.
        timings: timings by variant.
        bandwidth: bytes per second read and written by a plain copy.
    """
    found = {}
    for name, timing in timings.items():
        seconds = timing.median_ms / 1e3
        found[name] = {
            **timing._asdict(),
            "least_bytes": case.least_bytes,
            "gb_per_s": round(case.least_bytes / seconds / 1e9, 2),
            "copy_percent": round(100 * case.least_bytes / seconds / bandwidth, 1),
            "timed": getattr(case.variants[name], "timed", "calls"),
        }
        if case.flops:
            found[name] |= {"flops": case.flops, "tflop_per_s": round(case.flops / seconds / 1e12, 3)}
    return found


def _tuple(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def _run(
    function: Call,
    inputs: dict[str, Tensor],
    options: Mapping[str, Any],
    leaves: tuple[str, ...],
    grads: list[Tensor] | None,
) -> tuple[Tensor, ...]:
    """Return the results and, given ``grads`` of the results, the gradients of the leaves."""
    if grads is None:
        with torch.no_grad():
            return _tuple(function(**inputs, **options))
    tracked = {name: t.detach().requires_grad_() if name in leaves else t for name, t in inputs.items()}
    results = _tuple(function(**tracked, **options))
    gradients = torch.autograd.grad(results, [tracked[name] for name in leaves], grads)
    return *(result.detach() for result in results), *gradients


def _fresh(op: Op) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in op.inputs.items()} if op.in_place else op.inputs


def _run_fresh(function: Call, op: Op) -> tuple[Tensor, ...]:
    return _run(function, _fresh(op), op.options, op.leaves, None)


class _Gate:
    """Checks variants against the reference in float64.

    Args:
        op: the op.
        direction: direction of the case.
        variants: the case's variants; removed ones are not checked.
        calls: calls by variant that do not modify the inputs.
        grads: gradients of the results; None without backward.
    """

    def __init__(
        self,
        op: Op,
        direction: str,
        variants: Mapping[str, Callable[[], tuple[Tensor, ...]]],
        calls: Mapping[str, Callable[[], tuple[Tensor, ...]]],
        grads: list[Tensor] | None,
    ):
        self._op, self._direction, self._variants, self._calls, self._grads = op, direction, variants, calls, grads

    def __call__(self, *names: str) -> None:
        """Raise an AssertionError for the first inaccurate variant, of the given names or of all."""
        op = self._op
        for name in names or tuple(self._variants):
            for label, actual, exact, eager in zip(self._labels, self._calls[name](), *self._right, strict=True):
                wrong = complaint(name, actual, exact, eager)
                assert not wrong, f"{op.name} {self._direction}, {op.shape}: {name}, {label}: {wrong}"

    @functools.cached_property
    def _right(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The reference's results in float64, and in the dtypes of the inputs."""
        op, grads = self._op, self._grads
        inputs = {name: t.double() if t.is_floating_point() else t for name, t in op.inputs.items()}
        options = {name: torch.float64 if name == "out_dtype" else value for name, value in op.options.items()}
        doubled = None if grads is None else [g.double() for g in grads]
        exact = _run(op.reference, inputs, options, op.leaves, doubled)
        return exact, _run(op.reference, _fresh(op), op.options, op.leaves, grads)

    @functools.cached_property
    def _labels(self) -> list[str]:
        labels = [f"result {i}" for i in range(len(self._right[0]))]
        if self._grads is not None:
            labels[len(self._grads) :] = [f"gradient of {name}" for name in self._op.leaves]
        return labels
