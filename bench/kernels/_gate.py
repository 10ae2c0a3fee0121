"""How accurate a variant has to be before it is timed."""

from torch import Tensor

from fastmask.testing import fault

# What is asked of other libraries and of the compiler is the same function, not our precision: they get this many times
# the error that is allowed to ours.
OTHERS = 4


def complaint(variant: str, actual: Tensor, exact: Tensor, eager: Tensor) -> str:
    """Return what is wrong with a result of a variant, empty if nothing is.

    Args:
        variant: "ours" is held to the tests' own rule, others to `OTHERS` times it.
        actual: the result; integers have to be those of the reference.
        exact: the reference's in float64.
        eager: the reference's in the dtypes that ``actual`` was computed in.
    """
    return fault(actual, exact, eager, 1 if variant == "ours" else OTHERS)
