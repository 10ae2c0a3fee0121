"""The cases of the kernel benches: an op in one direction, with the calls to time and the check to pass first.

for case in all_cases(device, "xl2-in256"):
    case.check()
    timings = rows.measure(case.variants, device)
    ... figures(case, timings, bandwidth) ...
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import rows
from bench.instruments.calls import tuple_of
from bench.instruments.graph import Graphed
from bench.ops import OPS, Op, Shapes, describe, shapes_of
from bench.ops._description import Call
from fastmask.kernels import backends
from fastmask.testing import fault, weights_like
from fastmask.testing import results as results_of

PRESET = {"cuda": "xl2-in256", "cpu": "b2-in256"}
# Other libraries and the compiler have to compute the same function, but not with our precision: their error bound is
# this many times ours, which is that of the tests.
OTHERS = 4


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
        least_bytes: minimum traffic, see `Op.min_bytes`.
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


def forms(op: str) -> list[tuple[str, str]]:
    """Return the form and direction of each case of an op."""
    described = describe(op)
    return [(form, direction) for form in described.forms for direction in described.directions]


def make(
    op: str,
    form: str,
    direction: str,
    preset: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    compiler: bool = True,
    refused: Mapping[str, str] | None = None,
) -> Case:
    """Build one case at the shapes of a preset.

    Args:
        op: one of `OPS`.
        form: a form of its description.
        direction: "forward" or "forward_backward".
        preset: a masked preset, for the shapes.
        device: device of the tensors.
        dtype: matmul dtype; None is bfloat16 on a GPU and float32 on a CPU.
        compiler: include the compiled reference, which takes by far the longest.
        refused: known reasons why a variant cannot be captured, by variant.
    """
    shapes = shapes_of(preset, device, dtype)
    return case_of(describe(op).forms[form](shapes), direction, shapes, compiler=compiler, refused=refused)


def cases(op: str, preset: str, device: torch.device) -> Iterator[Case]:
    """Yield the cases of an op, its forms and directions; the tensors of each are allocated when it is reached."""
    for form, direction in forms(op):
        yield make(op, form, direction, preset, device)


def all_cases(device: torch.device, preset: str) -> Iterator[Case]:
    """Yield the cases of every op."""
    for op in OPS:
        yield from cases(op, preset, device)


def compiled(function: Call, device: torch.device) -> Call:
    """Compile a function for one shape; a graph break is an error."""
    torch._dynamo.reset()  # otherwise dynamo stops compiling a function after a few shapes and dtypes
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"
    return torch.compile(function, mode=mode, dynamic=False, fullgraph=True)


def case_of(
    op: Op, direction: str, shapes: Shapes, *, compiler: bool = True, refused: Mapping[str, str] | None = None
) -> Case:
    """Build the case of an op at these shapes; arguments as in `make`."""
    both, on_gpu = direction == "forward_backward", shapes.device.type == "cuda"
    results = _run(op, op.reference, copied=op.in_place)
    grads = [weights_like(result) for result in results if result.is_floating_point()] if both else None
    functions = _functions(op, both, shapes.device, compiler)
    variants: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    checked = dict(variants)
    for name, function in functions.items():
        if not isinstance(function, str):
            call = functools.partial(_run, op, function, grads)
            variants[name] = Graphed(call, (refused or {}).get(name, "")) if on_gpu and name not in op.host else call
            checked[name] = functools.partial(_run, op, function, copied=True) if op.in_place else variants[name]
    forward, backward = op.min_bytes(results)
    return Case(
        op=op.name,
        direction=direction,
        dtype=str(shapes.dtype).removeprefix("torch."),
        shape=op.shape,
        preset=shapes.preset,
        variants=variants,
        missing={name: function for name, function in functions.items() if isinstance(function, str)},
        least_bytes=forward + both * backward,
        flops=op.flops + both * op.backward_flops,
        check=functools.partial(_check, f"{op.name} {direction}, {op.shape}", variants, checked, _right(op, both)),
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


def _functions(op: Op, both: bool, device: torch.device, compiler: bool) -> dict[str, Call | str]:
    """Return the function of each variant, or the reason why it is missing."""
    found: dict[str, Call | str] = {"reference": op.reference}
    if device.type == "cuda" or (both and op.compile_on_cpu):
        found["compiled"] = compiled(op.reference, device)
    else:
        found["compiled"] = "on a CPU only forward+backward of the norms, the loss and gelu are, to save time"
    kernels = [row for row in backends() if row.device == device.type and row.op.startswith(op.kernel)]
    gaps = [row.reason for row in kernels if row.kernel == "none" and op.kernel]
    found["ours"] = gaps[0] if gaps else op.fused
    found |= op.others  # which can have a reason of their own why "compiled" is missing
    if not compiler:
        del found["compiled"]
    return found


def _run(op: Op, function: Call, grads: list[Tensor] | None = None, copied: bool = False) -> tuple[Tensor, ...]:
    """Return the results of an implementation and, given ``grads`` of the results, the gradients of the leaves."""
    if grads is None:
        with torch.no_grad():
            inputs = {name: t.clone() for name, t in op.inputs.items()} if copied else op.inputs
            return tuple_of(function(**inputs, **op.options))
    tracked = op.tracked()
    results = tuple_of(function(**tracked, **op.options))
    gradients = torch.autograd.grad(results, [tracked[name] for name in op.leaves], grads)
    return *(result.detach() for result in results), *gradients


def _right(op: Op, both: bool) -> Callable[[], dict[str, tuple[Tensor, Tensor]]]:
    """Return a function, run once, of the reference's results in float64 and in the inputs' dtypes, by name."""

    @functools.cache
    def right() -> dict[str, tuple[Tensor, Tensor]]:
        leaves = op.leaves if both else ()
        how = {"leaves": leaves, "in_place": op.in_place, **op.options}
        exact = results_of(op.reference, op.inputs, dtype=torch.float64, **how)
        eager = results_of(op.reference, op.inputs, **how)
        labels = [f"result {i}" for i in range(len(exact) - len(leaves))] + [f"gradient of {name}" for name in leaves]
        return dict(zip(labels, zip(exact, eager, strict=True), strict=True))

    return right


def _check(
    what: str,
    variants: Mapping[str, Any],
    calls: Mapping[str, Callable[[], tuple[Tensor, ...]]],
    right: Callable[[], dict[str, tuple[Tensor, Tensor]]],
    *names: str,
) -> None:
    """Raise an AssertionError for the first variant that is inaccurate against the reference in float64.

    Args:
        what: name of the case.
        variants: the case's variants; removed ones are not checked.
        calls: calls by variant that do not modify the inputs.
        right: the reference's results in float64 and in the inputs' dtypes.
        names: the variants to check; none is all.
    """
    for name in names or tuple(variants):
        for actual, (label, (exact, eager)) in zip(calls[name](), right().items(), strict=True):
            wrong = fault(actual, exact, eager, 1 if name == "ours" else OTHERS)
            assert not wrong, f"{what}: {name}, {label}: {wrong}"
