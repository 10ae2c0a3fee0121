"""How many patches are kept, and how that changes over a run (arXiv 2306.09305, section 3.2 and appendix)."""

import math
from collections.abc import Callable

# Each schedule maps u, the share of training done, to the weight of the starting ratio; the rest is the final ratio.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda u: 1.0,
    "linear": lambda u: 1.0 - u,
    "exp": lambda u: math.exp(-7.0 * u),
    "cosine2": lambda u: math.cos(math.pi * u / 2) ** 2,
    "cosine3": lambda u: math.cos(math.pi * u / 2) ** 3,
    "cosine4": lambda u: math.cos(math.pi * u / 2) ** 4,
    "cosine5": lambda u: math.cos(math.pi * u / 2) ** 5,
    "cosine6": lambda u: math.cos(math.pi * u / 2) ** 6,
}


def check_ratio(name: str, ratio: float) -> None:
    """Raise a ValueError unless ``ratio`` is in [0, 1)."""
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"{name} must be at least 0 and below 1, not {ratio}")


def kept_count(length: int, ratio: float) -> int:
    """Return K, how many of ``length`` positions are kept at a mask ratio: int(length * (1 - ratio)), at least 1."""
    check_ratio("mask_ratio", ratio)
    return max(1, int(length * (1.0 - ratio)))


def mask_ratio_at(schedule: str, share_done: float, start: float, end: float) -> float:
    """Return the mask ratio of a schedule.

    Args:
        schedule: a key of `SCHEDULES`.
        share_done: u, the share of training done, in [0, 1].
        start: r, the ratio at u = 0.
        end: m, the ratio that the schedule falls to; "exp" only comes within 0.1 % of it.

    Returns:
        (r - m) * weight(u) + m.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown mask schedule {schedule!r}: choose from {', '.join(SCHEDULES)}")
    if not 0.0 <= share_done <= 1.0:
        raise ValueError(f"the share of training done must be in [0, 1], not {share_done}")
    return (start - end) * SCHEDULES[schedule](share_done) + end
