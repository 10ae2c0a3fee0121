"""`python -m bench.traffic`: bytes that an op moves between memory and a GPU, counted exactly, forward and backward.

Four counts at the shapes of a preset, in units of one tensor of tokens:

    least      every input read once, every output written once
    ours       what our launches read and write, partial sums and what several programs read again included
    compiled   the buffers of the kernels that torch.compile makes of the reference (Inductor's own count, on the CPU)
    eager      the inputs and outputs of every operation of the reference that is not a view
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.compile import recorded
from bench.launches import empty
from fastmask.config import preset_config
from fastmask.kernels._triton import add_gated_norm, modulate_norm
from fastmask.kernels.add_gated_norm import add_gated_norm_reference
from fastmask.kernels.modulate_norm import modulate_norm_reference
from fastmask.presets import PRESETS

_BATCH = 128


class _BytesOfOperations(TorchDispatchMode):
    """Adds up what operations read and write, each tensor once per operation; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        storages = {t.untyped_storage()._cdata for t in read.values()}
        is_view = all(t.untyped_storage()._cdata in storages for t in written)
        if not is_view and "empty" not in func.name():
            self.total += sum(size(t) for t in (*read.values(), *written))
        return out


def size(t: Tensor) -> int:
    """Return the bytes of a tensor's values, those that an expanded dimension repeats once."""
    values = 1
    for length, stride in zip(t.shape, t.stride(), strict=True):
        values *= length if stride else 1
    return values * t.element_size()


def ours(call: Callable[[], Any]) -> int:
    """Return the bytes that a launcher moves: its kernels' arguments, and the sums that finish what they left."""
    with _BytesOfOperations() as operations:
        launches = recorded(call)
    total = operations.total
    for launch in launches:
        groups, chunks = launch.grid
        for name, value in launch.arguments.items():
            if isinstance(value, Tensor):
                # Each of the programs that share a group reads the group's modulation.
                again = chunks if value.shape[0] == groups and not name.startswith("grad_") else 1
                total += again * size(value)
    return total


def eager(op: Callable[..., Any], inputs: list[Tensor]) -> tuple[int, int]:
    """Return the bytes of the operations of a reference, forward and backward."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    with _BytesOfOperations() as forward:
        out = op(*leaves)
    outs = [out] if isinstance(out, Tensor) else list(out)
    grads = [torch.empty_like(o) for o in outs]
    with _BytesOfOperations() as backward:
        torch.autograd.grad(outs, leaves, grads)
    return forward.total, backward.total


def compiled(op: Callable[..., Any], inputs: list[Tensor]) -> tuple[int, int]:
    """Return the bytes of Inductor's kernels, forward and backward, counted at a batch of four and scaled."""
    small = [torch.zeros(4, *t.shape[1:], dtype=t.dtype, requires_grad=True) for t in inputs]
    # Inductor counts for this log alone.
    logging.getLogger("torch._inductor.compile_fx.__inductor_metrics").setLevel(logging.INFO)
    torch._dynamo.reset()
    metrics.reset()
    with inductor_config.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = torch.compile(op)(*small)
        forward = metrics.num_bytes_accessed
        outs = [out] if isinstance(out, Tensor) else list(out)
        torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
    scale = inputs[0].shape[0] // 4
    return int(forward * scale), int((metrics.num_bytes_accessed - forward) * scale)


def table(preset: str) -> Iterator[list[str]]:
    """Yield the rows of the table: op, dtypes, direction and the four counts."""
    config = preset_config(preset, PRESETS)
    tokens = int((config.image_size // 8 // config.patch_size) ** 2 * (1 - config.mask_ratio))
    width = config.width
    for name, low in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        dense = {"x": empty(_BATCH, tokens, width), "branch": empty(_BATCH, tokens, width, dtype=low)}
        modulation = empty(_BATCH, width, dtype=low)
        x, branch = (t.view(-1, width) for t in dense.values())
        stats, unit = empty(2, len(x)), size(branch)
        pair = (modulation, modulation, None, False)
        triple = (modulation, *pair)
        for op, fwd, bwd, tensors, moved in (
            (
                modulate_norm_reference,
                lambda a=(x, *pair, 1e-6, low): modulate_norm.launch_fwd(*a),
                lambda a=(branch, x, stats, *pair, False): modulate_norm.launch_bwd(*a),
                [dense["x"], modulation, modulation],
                (size(x) + unit, 2 * size(x) + unit),
            ),
            (
                add_gated_norm_reference,
                lambda a=(x, branch, *triple, 1e-6, low): add_gated_norm.launch_fwd(*a),
                lambda a=(x, branch, x, stats, branch, *triple, False): add_gated_norm.launch_bwd(*a),
                [dense["x"], dense["branch"], modulation, modulation, modulation],
                (2 * size(x) + 2 * unit, 3 * size(x) + 3 * unit),
            ),
        ):
            once = len(tensors[1:]) * size(modulation)  # read forward, read and written backward

            def reference(*inputs: Tensor, op: Callable[..., Any] = op, dtype: torch.dtype = low) -> Any:
                return op(*inputs, out_dtype=dtype)

            ours_both = ours(fwd), ours(bwd)
            others = zip(compiled(reference, tensors), eager(reference, tensors), strict=True)
            for i, (direction, (by_compiler, by_eager)) in enumerate(zip(("forward", "backward"), others, strict=True)):
                least = moved[i] + (1 + i) * once + size(stats)
                counts = [least, ours_both[i], by_compiler, by_eager]
                cells = [f"{count / 1e6:.1f}" for count in counts] + [f"{ours_both[i] / least:.3f}"]
                yield [op.__name__.removesuffix("_reference"), name, direction, *cells]


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="xl2-in256", choices=PRESETS)
    parser.add_argument("--out", type=Path, help="also write the table here, as Markdown")
    options = parser.parse_args()
    columns = ["op", "dtypes", "direction", "least MB", "ours MB", "compiled MB", "eager MB", "ours / least"]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in table(options.preset)]
    sys.stdout.write("\n".join(lines) + "\n")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        head = f"{options.preset}, {_BATCH} images, counted by `python -m bench.traffic`; no GPU was used.\n\n"
        options.out.write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
