"""What every differentiable op is held to, whatever it computes."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastmask.testing import assert_op_accurate, results

Op = Callable[..., Tensor | tuple[Tensor, ...]]


def check_accuracy(op: Op, inputs: Sequence[Tensor], **options) -> None:
    """Hold the fused form to float64, by what the reference reaches in the inputs' own dtypes."""
    assert_op_accurate(partial(op, impl="fused"), partial(op, impl="reference"), inputs, **options)
    for grad, t in zip(results(op, inputs, impl="fused", **options)[-len(inputs) :], inputs, strict=True):
        assert grad.dtype == t.dtype
        assert grad.shape == t.shape


def check_repeats(op: Op, inputs: Sequence[Tensor], **options) -> None:
    """Two runs give the same bits."""
    first, second = (results(op, inputs, impl="fused", **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_compiles(op: Op, inputs: Sequence[Tensor], *, dynamic: bool, **options) -> None:
    """Forward and backward compile into one graph without a break, and compute what eager execution does."""
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected = results(op, inputs, impl="fused", **options)
    for actual, same in zip(results(compiled, inputs, impl="fused", **options), expected, strict=True):
        torch.testing.assert_close(actual, same, rtol=1e-5, atol=1e-5)
