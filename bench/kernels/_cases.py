"""What the kernel benches share: the shapes of a preset, the variants of an op, their accuracy gate and figures.

A bench file describes its op once, as an `Op`; here it becomes a `Case` per direction, ready to check and to time.
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
    """The sizes of a preset's network and batch, in the letters of `fastmask.kernels`, and where tensors are made."""

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
        """Return random numbers, in the dtype of the products unless another is named."""
        made = torch.randn(shape, device=self.device, generator=self.generator)
        return made.to(dtype or self.dtype)

    def images(self) -> Tensor:
        """Return a batch of noised images, fp32."""
        return self.normal(self.batch, self.channels, self.side, self.side, dtype=torch.float32)


class Op(NamedTuple):
    """An op at one shape, as its bench file describes it.

    Attributes:
        name: of the public function.
        shape: for tables, such as "B=128 K=128 D=1152".
        inputs: tensors by the name of their argument.
        leaves: the inputs that get a gradient.
        again: the inputs that the gradients depend on, which backward has to read at least.
        reference: plain PyTorch, which takes the inputs and the options.
        fused: ours, likewise, or why the op refuses these tensors.
        kernel: how the names of its kernels begin; empty if it has none of its own.
        options: other arguments.
        others: the ecosystem's own: a call like `reference`, or why there is none.
        backward_only: variants whose forward is another's, and is not timed alone.
        part: share of an input that is needed at all, where that is not the whole.
        flops: of the products, forward.
        backward_flops: and backward.
        compile_on_cpu: compile forward+backward on a CPU too, which takes half a minute.
        host: variants that wait for the device, and so cannot be replayed from a CUDA graph.
        in_place: its calls change their inputs, so that they are checked on copies.
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
    backward_only: tuple[str, ...] = ()
    part: Mapping[str, float] = {}
    flops: int = 0
    backward_flops: int = 0
    compile_on_cpu: bool = False
    host: tuple[str, ...] = ()
    in_place: bool = False


class Case(NamedTuple):
    """An op in one direction: what a row says of it, the calls to time, and the check to pass before.

    Attributes:
        op: name of the public function.
        direction: "forward" (without a graph for backward) or "forward_backward".
        dtype: of the products, such as "bfloat16".
        shape: for tables.
        preset: where the shape is from.
        variants: a call without arguments by name: "reference", "compiled", "ours" and the ecosystem's.
        missing: why a variant is not there, and how to get it.
        least_bytes: forward every input and result once; backward the gradients of the results, the inputs that the
            derivative depends on, and the gradients of inputs.
        flops: of matmuls and attention; 0 if there are none.
        check: raises an AssertionError when a variant is inaccurate, of those that are named, or without names of all.
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
        preset: a masked one; a ValueError says so otherwise.
        device: where tensors are made.
        dtype: of products; None is bfloat16 on a GPU and float32 on a CPU.
    """
    config = preset_config(preset, PRESETS)
    if not config.network.decoder_depth:
        raise ValueError(f"preset {preset} has no masks and no decoder to take shapes from: give a masked one")
    on_gpu = device.type == "cuda"
    latents = config.data != "digits"  # of the VAE; the digits are pixels
    side = config.image_size // 8 if latents else config.image_size
    length = (side // config.network.patch_size) ** 2
    return Shapes(
        preset=preset,
        device=device,
        dtype=dtype or (torch.bfloat16 if on_gpu else torch.float32),
        batch=config.micro_batch if on_gpu else CPU_BATCH,
        length=length,
        keep=kept_count(length, config.mask_ratio),
        width=config.network.width,
        heads=config.network.num_heads,
        decoder_width=config.network.decoder_width,
        channels=4 if latents else 1,
        patch=config.network.patch_size,
        side=side,
        generator=torch.Generator(device).manual_seed(0),
    )


def absent(module: str, how: str, device: torch.device) -> str:
    """Return why a library for GPUs cannot be used, and how to get it; empty if it can."""
    if importlib.util.find_spec(module.split(".")[0]) is None:
        return f"not installed: {how}"
    return "" if device.type == "cuda" else f"runs on a GPU, not on {device.type}"


def compiled(function: Call, device: torch.device) -> Call:
    """Return a function as torch.compile makes it for one shape, in one graph; a graph break is an error."""
    torch._dynamo.reset()  # which stops compiling a function after a few shapes and dtypes
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"
    return torch.compile(function, mode=mode, dynamic=False, fullgraph=True)


def case_of(
    op: Op, direction: str, shapes: Shapes, *, compiler: bool = True, refused: Mapping[str, str] | None = None
) -> Case:
    """Return an op in one direction with its variants.

    Args:
        op: at its shape.
        direction: one of `DIRECTIONS`.
        shapes: what the op was made from.
        compiler: whether the compiled reference is one of them, which takes by far the longest.
        refused: by variant, why it cannot be captured, where that is known.
    """
    both = direction == "forward_backward"
    on_gpu = shapes.device.type == "cuda"
    with torch.no_grad():
        results = _tuple(op.reference(**_fresh(op), **op.options))
    grads = [shapes.normal(*result.shape, dtype=result.dtype) for result in results if result.is_floating_point()]

    functions: dict[str, Call | str] = {"reference": op.reference}
    if compiler and (on_gpu or (both and op.compile_on_cpu)):
        functions["compiled"] = compiled(op.reference, shapes.device)
    elif compiler:
        functions["compiled"] = "on a CPU only forward+backward of the norms, the loss and gelu are, to save time"
    kernels = [row for row in backends() if row.device == shapes.device.type and row.op.startswith(op.kernel)]
    gaps = [row.reason for row in kernels if row.kernel == "none" and op.kernel]
    functions["ours"] = gaps[0] if gaps else op.fused
    functions |= {name: other for name, other in op.others.items() if both or name not in op.backward_only}
    if not compiler:
        functions.pop("compiled", None)  # for which an op may have a reason of its own

    variants: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    checked: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    for name, function in functions.items():
        if not isinstance(function, str):
            call = functools.partial(_run, function, op.inputs, op.options, op.leaves, grads if both else None)
            variants[name] = Graphed(call, (refused or {}).get(name, "")) if on_gpu and name not in op.host else call
            once = functools.partial(_run_fresh, function, op)
            checked[name] = once if op.in_place else variants[name]
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
    """Return what a row says of each variant.

    Args:
        case: what was timed.
        timings: by variant.
        bandwidth: bytes per second that a plain copy reads and writes.
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
    """Return the results, and with ``grads``, those of the results, the gradients of the leaves."""
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
    """Holds variants to the reference in float64.

    Args:
        op: what is checked.
        direction: of the case.
        variants: those of the case; what is taken out of them is not checked.
        calls: by variant, a call that leaves the inputs as they are.
        grads: of the results; None without backward.
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
        """Raise an AssertionError for the first inaccurate variant, of some or of all."""
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
