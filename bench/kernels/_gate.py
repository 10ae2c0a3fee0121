"""How accurate a variant has to be before it is timed."""

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from bench import rows

# What is asked of other libraries and of the compiler is the same function, not our precision: their error may be this
# many times the reference's, and one rounding.
OTHERS = 8


def complaint(variant: str, actual: Tensor, exact: Tensor, eager: Tensor) -> str:
    """Return what is wrong with a result of a variant, empty if nothing is.

    Args:
        variant: "ours" is held to the tests' own measure, others to `OTHERS`.
        actual: the result; integers have to be those of the reference.
        exact: the reference's in float64.
        eager: the reference's in the dtypes that ``actual`` was computed in.
    """
    if not exact.is_floating_point():
        return "" if torch.equal(actual, exact) else "differs from the reference"
    judge = _assert_accurate() if variant == "ours" else _assert_same_function
    try:
        judge(actual, exact, eager)
    except AssertionError as error:
        return str(error)
    return ""


def _assert_same_function(actual: Tensor, exact: Tensor, eager: Tensor) -> None:
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    assert actual.dtype == eager.dtype, f"dtype {actual.dtype}, not {eager.dtype}"
    error, allowed = (actual.double() - exact).norm(), (eager.double() - exact).norm()
    bound = OTHERS * allowed + torch.finfo(actual.dtype).eps * exact.norm()
    assert error <= bound, f"error {error:.3g} above {bound:.3g}"  # false for NaN


@functools.cache
def _assert_accurate() -> Callable[[Tensor, Tensor, Tensor], None]:
    """Return the tests' own measure, by its path: outside pytest their folder is not imported from."""
    spec = importlib.util.spec_from_file_location("fastmask_tests_util", rows.ROOT / "tests" / "util.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.assert_accurate
