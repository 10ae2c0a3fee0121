"""`python -m bench.instruments.traffic`: exact memory traffic of each op on a GPU, forward and backward.

Four counts at the shapes of a preset, in MB (10^6 bytes):

    least      minimum traffic: every input read once, every output written once
    ours       reads and writes of our launches, including partial sums. Tensors that many programs read, modulations
               and position tables below 1 MB, stay in the L2 cache of any GPU here and count once
    compiled   buffers of the kernels that torch.compile generates for the reference (Inductor's own count, on the CPU)
    eager      inputs and outputs of every operation of the reference that is not a view
"""

import argparse
import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor import metrics
from torch._inductor.async_compile import AsyncCompile
from torch.utils._pytree import tree_leaves

from bench.instruments.calls import OpCall, calls_of, passes
from bench.instruments.compile import recorded
from bench.instruments.operators import Operators, size
from bench.ops import OPS, Op, describe, shapes_of
from bench.report.tables import header, line, write_table
from fastmask.presets import PRESETS

_BATCH = 128
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Counts = tuple[int, int]  # forward and backward


def least(op: Op, results: tuple[Tensor, ...]) -> Counts:
    """Return the minimum traffic, with all of each tensor that a launch takes, and the statistics that backward needs.

    The kernels take whole tensors, so what they skip cannot be counted.
    """
    whole = op._replace(part={}, again=(*op.again, *op.unread))
    forward, backward = whole.min_bytes(results)
    return forward + op.statistics, backward + op.statistics


def ours(op: Op, calls: list[OpCall], results: tuple[Tensor, ...]) -> int:
    """Return the traffic of an op's launches: their kernels' arguments, and the final sums in PyTorch.

    A kernel reaches the tensors of a list by addresses in a table rather than as arguments, and writes those among them
    that are the results of an op in place.
    """
    with Operators() as operators:
        launches = [launch for call in calls for launch in recorded(call.launch)]
    reached = [t for call in calls for arg in call.args if isinstance(arg, (list, tuple)) for t in tree_leaves(arg)]
    arguments = [value for launch in launches for value in launch.arguments.values() if isinstance(value, Tensor)]
    counted = [t for t in arguments if not any(t is other for other in reached)]
    return operators.bytes + sum(size(t) for t in (*counted, *reached, *(results if op.in_place else ())))


class _Inductor:
    """Counts the bytes of Inductor's kernels that are generated in a block, with its caches disabled.

    Inductor counts the buffers of the kernels that it generates, so they do not have to be compiled: a stand-in for the
    C++ compiler fills the buffers with zeros, which are valid indices.
    """

    bytes = 0

    def __enter__(self) -> "_Inductor":
        # Inductor only counts if this logger is enabled.
        logging.getLogger("torch._inductor.compile_fx.__inductor_metrics").setLevel(logging.INFO)
        metrics.reset()
        self._inside = contextlib.ExitStack()
        self._inside.enter_context(inductor_config.patch(force_disable_caches=True))
        self._inside.enter_context(mock.patch.object(AsyncCompile, "cpp_pybinding", _stand_in))
        self._inside.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        return self

    def __exit__(self, *error: object) -> None:
        self.bytes = int(metrics.num_bytes_accessed)
        self._inside.close()


def _stand_in(*source: Any, **options: Any) -> Callable[..., None]:
    def fill(*buffers: Any) -> None:
        for t in buffers:
            if isinstance(t, Tensor):
                t.zero_()

    return fill


def table(preset: str) -> Iterator[list[str]]:
    """Yield the rows of the table: op, dtype, direction and the four counts; an op in place in fp32 alone."""
    described = {name: describe(name).counted for name in OPS}
    for in_place in (False, True):
        for name, dtype in _DTYPES.items():
            shapes = shapes_of(preset, torch.device("meta"), dtype)._replace(batch=_BATCH)
            for make in filter(None, described.values()):
                op = make(shapes)
                if op.in_place == in_place and (dtype == torch.float32 or not in_place):
                    yield from ([op.name, name, *cells] for cells in rows(op))


def rows(op: Op) -> Iterator[list[str]]:
    """Yield the direction and the four counts of an op at a preset's shapes, without data."""
    *by_eager, results = passes(op, op.reference, Operators)
    torch._dynamo.reset()
    zeros = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in op.inputs.items()}
    *by_compiler, _ = passes(op._replace(inputs=zeros), torch.compile(op.reference), _Inductor)
    counts = (
        least(op, results),
        [ours(op, calls, results) for calls in calls_of(op)],
        [counted.bytes for counted in by_compiler],
        [counted.bytes for counted in by_eager],
    )
    for direction, *of in zip(("forward", "backward"), *counts, strict=True):
        if op.in_place and direction == "backward":
            return  # it has none
        yield ["step" if op.in_place else direction, *(f"{count / 1e6:.1f}" for count in of), f"{of[1] / of[0]:.3f}"]


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m bench.instruments.traffic", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="xl2-in256", choices=PRESETS)
    parser.add_argument("--out", type=Path, help="also write the table to this file, as Markdown")
    options = parser.parse_args()
    columns = ["op", "dtypes", "direction", "least MB", "ours MB", "compiled MB", "eager MB", "ours / least"]
    lines = [*header(columns), *map(line, table(options.preset))]
    sys.stdout.write("\n".join(lines) + "\n")
    if options.out:
        by = f"{options.preset}, {_BATCH} images, counted by `python -m bench.instruments.traffic`"
        write_table(options.out, f"{by}; no GPU was used.", lines)


if __name__ == "__main__":
    main()
