"""The accuracy that a variant needs before it is timed."""

from torch import Tensor

from fastmask.testing import fault

# Other libraries and the compiler have to compute the same function, but not with our precision: their error bound is
# this many times ours.
OTHERS = 4


def complaint(variant: str, actual: Tensor, exact: Tensor, eager: Tensor) -> str:
    """Return the error in a variant's result, empty if there is none.

    Args:
        variant: "ours" has to meet the tests' bound, others `OTHERS` times that.
        actual: the result; integers must be equal to the reference.
        exact: the reference's result in float64.
        eager: the reference's result in the dtypes of ``actual``.
    """
    return fault(actual, exact, eager, 1 if variant == "ours" else OTHERS)
