"""Accuracy rule for kernels and networks, used by the tests and benchmarks here and usable for your own kernels.

    exact = reference(*(t.double() for t in inputs))
    assert_accurate(kernel(*inputs), exact, reference(*inputs))

A bound has to hold on every processor. Two equally accurate programs have different rounding errors: they sum in
another order, with other vector lengths, with or without fused multiply-add. So no bound compares one random number
with another. There are two rules:

- `error_over_bound`, for the results of an op: the error can be twice that of PyTorch's operations in the same dtypes,
  plus one rounding, with a larger margin for few values.
- `norm_error_over_bound`, for a network or anything else without such a reference: in the 2-norm, the error can be 8
  roundings for one step, and grows with the square root of the number of steps.

Both return the error divided by its bound: at most 1 is accurate. Requires only torch.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Inputs = Sequence[Tensor] | Mapping[str, Tensor]

# The ratio of two RMS errors of N values varies by about 1 / sqrt(N). Eight times that is exceeded less than once in
# 100,000 tensors of 8 or more values, for two programs with independent errors of up to four roundings.
_SCATTER = 8.0
# Largest RMS error of one rounding, u / sqrt(3): uniform in +-u for a value just above a power of 2.
_ROUNDING_RMS = 0.6
# Roundings per step. In fp32 a sum of a few hundred values is also accumulated in fp32, in any order; in 16 bits sums
# are fp32 and the result is rounded once: by 0.4 in the RMS, and at most 1 for any value.
_STEP_ROUNDINGS = {torch.float64: 8.0, torch.float32: 8.0, torch.bfloat16: 1.0, torch.float16: 1.0}
# Gradients that cancel are compared with this share of a typical one, since their terms are not smaller.
_TYPICAL = 0.1


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Return |actual - exact| / |exact| in the 2-norm, computed in float64; NaN (which fails every bound) for 0 / 0."""
    if actual.shape != exact.shape:
        raise ValueError(f"shapes {tuple(actual.shape)} and {tuple(exact.shape)} differ")
    actual, exact = actual.detach().double(), exact.detach().double()
    return float((actual - exact).norm() / exact.norm())


def error_over_bound(actual: Tensor, exact: Tensor, eager: Tensor) -> float:
    """Return the error of an op's result divided by its bound; at most 1 is accurate.

    With N values, e = actual - exact, e' = eager - exact and u half the spacing of ``actual``'s dtype at 1:

        rms(e) <=     (1 + 8 / sqrt(N)) (2 rms(e') + 0.6 u rms(exact))
        max|e| <= 2 * (1 + 8 / sqrt(N)) (2 max|e'| +     u max|exact|)

    The error of PyTorch's operations measures the cost of the arithmetic: sums, cancellation, and 16-bit intermediates.
    Twice that allows for sums in another order, and one rounding covers cases where PyTorch happens to be exact. The
    RMS of many values has little variance and detects a global loss of precision; the RMS of few values varies, hence
    the factor with N. The maximum varies for any number of values, hence twice the bound: it detects local errors, such
    as in a row or a tail, which are large.

    Args:
        actual: the result to check; any shape, floating dtype or integers (which must be equal).
        exact: the exact result in float64, same shape.
        eager: the reference result for the same inputs, in the dtype of ``actual``.

    Returns:
        A number >= 0; infinity for NaN, another dtype or another shape.

    Raises:
        ValueError: ``exact`` is floating and not float64, or ``exact`` or ``eager`` is not finite.
    """
    if _difference(actual, exact, eager):
        return math.inf
    if not exact.is_floating_point():
        return 0.0 if torch.equal(actual, exact) else math.inf
    _check_finite(exact, eager)
    if not exact.numel():
        return 0.0
    error, allowed = actual.detach().double() - exact, eager.detach().double() - exact
    rounding, room = _rounding(actual.dtype), 1 + _SCATTER / math.sqrt(exact.numel())
    rms = _over(_rms(error), room * (2 * _rms(allowed) + _ROUNDING_RMS * rounding * _rms(exact)))
    largest = _over(_max(error), 2 * room * (2 * _max(allowed) + rounding * _max(exact)))
    return max(rms, largest)


def fault(actual: Tensor, exact: Tensor, eager: Tensor, times: float = 1.0) -> str:
    """Return a description of an inaccurate result, empty if it is accurate; see `error_over_bound`.

    Args:
        actual: the result to check.
        exact: the exact result in float64, or integers.
        eager: the reference result, in the dtype of ``actual``.
        times: allowed multiple of the bound.
    """
    over = error_over_bound(actual, exact, eager)
    if over <= times:
        return ""
    if not exact.is_floating_point() or _difference(actual, exact, eager):
        return _difference(actual, exact, eager) or "differs from the reference"
    found, allowed = (t.detach().double() - exact for t in (actual, eager))
    errors = f"rms {_rms(found):.3g}, largest {_max(found):.3g}; PyTorch's {_rms(allowed):.3g} and {_max(allowed):.3g}"
    return f"error {over:.3g} times its bound, {times:.3g} is allowed: {errors}"


def assert_accurate(actual: Tensor, exact: Tensor, eager: Tensor, name: str = "result") -> None:
    """Raise an AssertionError unless an op's result is accurate; see `error_over_bound` for the rule and arguments.

    Args:
        actual: the result to check.
        exact: the exact result in float64.
        eager: the reference result, in the dtype of ``actual``.
        name: name of the result in the message.
    """
    wrong = fault(actual, exact, eager)
    if wrong:
        raise AssertionError(f"{name}: {wrong}")


def norm_error_over_bound(
    actual: Tensor,
    exact: Tensor,
    steps: float = 1,
    *,
    dtype: torch.dtype | None = None,
    eager: Tensor | None = None,
    least: float = 0.0,
) -> float:
    """Return the 2-norm error of a tensor divided by its bound; at most 1 is accurate.

        |actual - exact| <= r sqrt(steps) u max(|exact|, least) + 2 |eager - exact|,  r = 8, or 1 in 16 bits

    Errors of consecutive steps are independent and their squares add up, so the bound grows with the square root of
    their number. A step is an op whose result is rounded: a norm, a Linear, an activation, a gated addition; attention
    counts as three; `network_steps` counts the steps of a network. The norm averages over all values, and u, half the
    spacing at 1, is a property of the dtype: without ``eager`` the bound contains nothing random.

    Args:
        actual: the result to check, any shape.
        exact: the exact result, same shape; in float64, or in the same precision when two methods are compared.
        steps: number of consecutive roundings on the longest path from the inputs to the result.
        dtype: least precise dtype on that path; None is the dtype of ``actual``.
        eager: the reference result in the dtype of ``actual``, if it is more informative than the number of steps.
        least: lower bound of the norm of ``exact``.

    Returns:
        A number >= 0; infinity for NaN or another shape.

    Raises:
        ValueError: ``exact`` or ``eager`` is not finite.
    """
    if actual.shape != exact.shape or (eager is not None and eager.shape != exact.shape):
        return math.inf
    right = exact.detach().double()
    _check_finite(right, right if eager is None else eager)
    dtype = dtype or actual.dtype
    size = max(float(right.norm()), least)
    bound = _STEP_ROUNDINGS[dtype] * math.sqrt(steps) * _rounding(dtype) * size
    if eager is not None:
        bound += 2 * float((eager.detach().double() - right).norm())
    return _over(float((actual.detach().double() - right).norm()), bound)


def network_steps(blocks: int, *, backward: bool = False) -> int:
    """Return the number of consecutive roundings in a network of ``blocks`` transformer blocks.

    A block has 12: two norms, four Linears, three for attention, an activation and two gated additions. Outside of the
    blocks there are 17: preconditioning 1, patch embedding 2, time embedding 4, encoder to decoder 3, head 2, loss 5.
    Each has a counterpart in ``backward``.
    """
    return (12 * blocks + 17) * (1 + backward)


def assert_near(
    actual: Tensor,
    exact: Tensor,
    steps: float = 1,
    *,
    dtype: torch.dtype | None = None,
    name: str = "result",
) -> None:
    """Raise an AssertionError unless a tensor is accurate in the 2-norm; see `norm_error_over_bound`.

    Args:
        actual: the result to check, any shape.
        exact: the exact result, same shape.
        steps: number of consecutive roundings.
        dtype: least precise dtype on the path; None is the dtype of ``actual``.
        name: name of the result in the message.
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, not {tuple(exact.shape)}")
    over = norm_error_over_bound(actual, exact, steps, dtype=dtype)
    if not over <= 1:
        relative = relative_error(actual, exact)
        raise AssertionError(f"{name}: error {over:.3g} times its bound: {relative:.3g} of the norm")


def network_errors_over_bound(
    actual: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    steps: float,
    *,
    dtype: torch.dtype | None = None,
    eager: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Return by name the error divided by its bound of related tensors, such as the gradients of a network.

    `norm_error_over_bound` is applied to each tensor separately, so that errors of small tensors are detected. Tensors
    below a tenth of the RMS of all values are compared with that tenth: such a gradient is a sum whose terms cancel,
    but not their rounding errors.

    Args:
        actual: the tensors to check, any shapes.
        exact: the exact tensors, by the same names.
        steps: number of consecutive roundings through the network and back.
        dtype: least precise dtype on the path; None is the dtype of each tensor.
        eager: the reference tensors in the dtypes of ``actual``, if they are more informative than the number of steps.

    Raises:
        ValueError: the names differ, or ``exact`` or ``eager`` is not finite.
    """
    if actual.keys() != exact.keys() or (eager is not None and eager.keys() != exact.keys()):
        differing = sorted(actual.keys() ^ exact.keys()) or "those of eager"
        raise ValueError(f"the names of the tensors differ: {differing}")
    squares = sum(float(t.detach().double().square().sum()) for t in exact.values())
    typical = math.sqrt(squares / max(1, sum(t.numel() for t in exact.values())))
    return {
        name: norm_error_over_bound(
            actual[name],
            t,
            steps,
            dtype=dtype,
            eager=None if eager is None else eager[name],
            least=_TYPICAL * typical * math.sqrt(t.numel()),
        )
        for name, t in exact.items()
    }


def assert_network_accurate(
    actual: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    steps: float,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise an AssertionError with the worst tensor unless all are accurate; see `network_errors_over_bound`.

    Args:
        actual: the tensors to check, any shapes.
        exact: the exact tensors, by the same names.
        steps: number of consecutive roundings through the network and back.
        dtype: least precise dtype on the path; None is the dtype of each tensor.
    """
    errors = network_errors_over_bound(actual, exact, steps, dtype=dtype)
    wrong = {name: over for name, over in errors.items() if not over <= 1}
    if wrong:
        name, over = max(wrong.items(), key=lambda item: item[1])
        count = f"{len(wrong)} of {len(errors)} tensors"
        raise AssertionError(f"{count}, most of all {name}: error {over:.3g} times its bound")


def results(
    function: Callable[..., Any],
    inputs: Inputs,
    *,
    leaves: Collection[str | int] | None = None,
    dtype: torch.dtype | None = None,
    in_place: bool = False,
    **options: Any,
) -> list[Tensor]:
    """Return the results of an op, then the gradient of each leaf for a fixed weighting of the results.

    Args:
        function: the op; returns one or several tensors.
        inputs: input tensors, positional or by argument name; any shapes and dtypes.
        leaves: inputs that get a gradient, by name or index; None is all floating ones.
        dtype: dtype to convert floating inputs and floating dtype options to; None keeps them.
        in_place: whether the op changes its inputs, which are then copied; no gradients.
        options: other arguments of the op.
    """
    given: dict[Any, Tensor] = {}
    for key, tensor in _named(inputs).items():
        given[key] = tensor.detach().to(dtype if dtype and tensor.is_floating_point() else tensor.dtype)
        if in_place:
            given[key] = given[key].clone()
    tracked = [given[key].requires_grad_() for key in _leaves(inputs, leaves, in_place)]
    if dtype:
        floating = {key for key, v in options.items() if isinstance(v, torch.dtype) and v.is_floating_point}
        options = {key: dtype if key in floating else value for key, value in options.items()}
    out = function(**given, **options) if isinstance(inputs, Mapping) else function(*given.values(), **options)
    outs = [out] if isinstance(out, Tensor) else list(out)
    grads: Sequence[Tensor] = ()
    if tracked:
        weighted = [o for o in outs if o.requires_grad]
        grads = torch.autograd.grad(weighted, tracked, [weights_like(o) for o in weighted])
    return [o.detach() for o in outs] + list(grads)


def weights_like(t: Tensor) -> Tensor:
    """Return varying weights, none of them small, that are exact in every dtype."""
    index = torch.arange(t.numel(), dtype=torch.float64, device=t.device)
    return (index.mul(0.7).sin().add(1.5) * 32).round().div(32).to(t.dtype).view(t.shape)


def op_errors_over_bound(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Inputs,
    *,
    leaves: Collection[str | int] | None = None,
    in_place: bool = False,
    **options: Any,
) -> dict[str, float]:
    """Return by name the error divided by its bound of each result and gradient of an op; at most 1 is accurate.

    The reference runs in float64 and in the inputs' dtypes, then the op runs with uninitialised memory filled with NaN,
    which reveals values that are never written. The rule is `error_over_bound`.

    Args:
        function: the op to check.
        reference: plain PyTorch with the same arguments.
        inputs: input tensors, positional or by argument name; any shapes and dtypes.
        leaves: inputs that get a gradient, by name or index; None is all floating ones.
        in_place: whether the op changes its inputs; each call then gets copies.
        options: other arguments of both.
    """
    three = _three(function, reference, inputs, leaves=leaves, in_place=in_place, **options)
    return {name: error_over_bound(*tensors) for name, tensors in three.items()}


def assert_op_accurate(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Inputs,
    *,
    leaves: Collection[str | int] | None = None,
    in_place: bool = False,
    **options: Any,
) -> None:
    """Raise an AssertionError with the first inaccurate result or gradient of an op; see `op_errors_over_bound`.

    Args:
        function: the op to check.
        reference: plain PyTorch with the same arguments.
        inputs: input tensors, positional or by argument name; any shapes and dtypes.
        leaves: inputs that get a gradient, by name or index; None is all floating ones.
        in_place: whether the op changes its inputs; each call then gets copies.
        options: other arguments of both.
    """
    three = _three(function, reference, inputs, leaves=leaves, in_place=in_place, **options)
    for name, (actual, exact, eager) in three.items():
        assert_accurate(actual, exact, eager, name)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill uninitialised memory with NaN (integers: the largest value) inside the block."""
    was_on = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=only_warned)
        settings.fill_uninitialized_memory = filled


def _three(
    function: Callable[..., Any], reference: Callable[..., Any], inputs: Inputs, **how: Any
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return results and gradients by name: from the op, from the reference in float64, and from the reference."""
    exact = results(reference, inputs, dtype=torch.float64, **how)
    eager = results(reference, inputs, **how)
    with poisoned():
        actual = results(function, inputs, **how)
    if len(actual) != len(exact):
        raise ValueError(f"the op and its reference return {len(actual)} and {len(exact)} results and gradients")
    gradients = [f"gradient of {key}" for key in _leaves(inputs, how["leaves"], how["in_place"])]
    names = [f"result {i}" for i in range(len(exact) - len(gradients))] + gradients
    doubled = [t.double() if t.is_floating_point() else t for t in exact]
    return dict(zip(names, zip(actual, doubled, eager, strict=True), strict=True))


def _leaves(inputs: Inputs, leaves: Collection[str | int] | None, in_place: bool) -> list[str | int]:
    """Return the keys of the inputs that get a gradient."""
    if in_place:
        return []
    if leaves is not None:
        return list(leaves)
    return [key for key, tensor in _named(inputs).items() if tensor.is_floating_point()]


def _named(inputs: Inputs) -> dict[str | int, Tensor]:
    return dict(inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs))


def _difference(actual: Tensor, exact: Tensor, eager: Tensor) -> str:
    """Return how dtypes or shapes differ; empty if they do not."""
    if actual.dtype != eager.dtype or actual.is_floating_point() != exact.is_floating_point():
        return f"dtype {actual.dtype}, not {eager.dtype}"
    if not actual.shape == exact.shape == eager.shape:
        return f"shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    return ""


def _check_finite(exact: Tensor, eager: Tensor) -> None:
    if exact.dtype != torch.float64:
        raise ValueError(f"exact must be float64, not {exact.dtype}")
    for name, t in (("exact", exact), ("eager", eager)):
        if not t.isfinite().all():
            raise ValueError(f"{name} must be finite: there is no error to compare with")


def _rounding(dtype: torch.dtype) -> float:
    """Return u, the largest relative error of one rounding: half the spacing at 1."""
    return torch.finfo(dtype).eps / 2


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


def _max(t: Tensor) -> float:
    return float(t.abs().max())


def _over(error: float, bound: float) -> float:
    """Return error / bound; infinity for NaN, and for any error with a bound of 0."""
    if error == 0:
        return 0.0
    return error / bound if bound and math.isfinite(error) else math.inf
