"""What every differentiable op is held to, whatever it computes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from util import assert_accurate

Op = Callable[..., Tensor | tuple[Tensor, ...]]


def results(op: Op, inputs: Sequence[Tensor], dtype: torch.dtype | None = None, **options) -> list[Tensor]:
    """Return an op's results, then the gradient of each input for a weighted sum of the results.

    Args:
        op: the op.
        inputs: its tensors; floating ones get gradients.
        dtype: what they are converted to first; None leaves them.
        options: its keywords.
    """
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    out = op(*leaves, **options)
    outs = [out] if isinstance(out, Tensor) else list(out)
    total = sum((o.double() * weights_like(o)).sum() for o in outs)
    total.backward()
    return [o.detach() for o in outs] + [t.grad for t in leaves]


def weights_like(t: Tensor) -> Tensor:
    """Return numbers that differ from place to place, of which none is small."""
    return (torch.arange(t.numel(), dtype=torch.float64, device=t.device) * 0.7).sin().add(1.5).view(t.shape)


def check_accuracy(op: Op, inputs: Sequence[Tensor], **options) -> None:
    """Hold the fused form to float64, by what the reference reaches in the inputs' own dtypes."""
    exact = results(op, inputs, torch.float64, impl="reference", **options)
    eager = results(op, inputs, impl="reference", **options)
    fused = results(op, inputs, impl="fused", **options)
    for actual, true, by_eager in zip(fused, exact, eager, strict=True):
        assert_accurate(actual, true.double(), by_eager)
    for grad, t in zip(fused[-len(inputs) :], inputs, strict=True):
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


def poison_empty(monkeypatch) -> None:
    """Fill floating tensors that are allocated without values with NaN, so that one left unwritten shows."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            t = allocate(*args, **kwargs)
            return t.fill_(torch.nan) if t.is_floating_point() else t

        return allocate_poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    assert torch.zeros(1).new_empty(1).isnan()
