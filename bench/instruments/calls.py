"""The calls of this library's ops that have a Triton kernel, and their launches.

They are recorded while an op or a step runs, with data or without, and can be launched again alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.ops import Op
from fastmask.kernels._dispatch import _TRITON_OPS, _launcher


class OpCall(NamedTuple):
    """A call of an op, such as "modulate_norm_fwd"."""

    name: str
    args: tuple[Any, ...]

    def launch(self) -> Any:
        """Call the op's launcher, on whatever device the tensors are."""
        return _launcher(self.name, _TRITON_OPS[self.name])(*self.args)


class Calls(TorchDispatchMode):
    """Records the calls of ops that have a Triton kernel, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[OpCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("fastmask::")
        if name in _TRITON_OPS:
            self.calls.append(OpCall(name, args))
        return func(*args, **(kwargs or {}))


def tuple_of(out: Any) -> tuple[torch.Tensor, ...]:
    """Return the results of an op as a tuple."""
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


def passes(op: Op, function: Callable[..., Any], mode: Callable[[], Any]) -> tuple[Any, Any, tuple[torch.Tensor, ...]]:
    """Run forward and backward of an op, each under a dispatch mode of its own; return both, and the results."""
    inputs = op.tracked()
    with mode() as forward:
        results = tuple_of(function(**inputs, **op.options))
    with mode() as backward:
        if op.leaves:
            grads = [torch.empty_like(result) for result in results]
            torch.autograd.grad(results, [inputs[name] for name in op.leaves], grads)
    return forward, backward, results


def calls_of(op: Op) -> tuple[list[OpCall], list[OpCall]]:
    """Return the calls of an op's own kernels, forward and backward."""
    assert callable(op.fused), op.fused
    forward, backward, _ = passes(op, op.fused, Calls)
    return tuple([call for call in mode.calls if call.name.startswith(op.kernel)] for mode in (forward, backward))
