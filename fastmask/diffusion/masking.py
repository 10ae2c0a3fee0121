"""How many patches are kept, in each sample and over a run (arXiv 2306.09305, section 3.2 and appendix).

Where each sample draws its own ratio, the numbers that `GROUP` consecutive samples keep are always the same, shuffled:
a batch then has a constant number of kept tokens, so one compiled graph serves every batch.
"""

import bisect
import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastmask.kernels import random_uniform

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

# Samples GROUP * n .. GROUP * n + GROUP - 1 of a run share out one multiset of kept counts.
GROUP = 8
_RATIO_STREAM = 7  # of the counter-based generator; the list is in fastmask/diffusion/draws.py
_POINTS = 1024  # steps at which the mean of a longer part of a schedule is taken


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


class Stage(NamedTuple):
    """Consecutive steps that keep the same number of positions.

    Attributes:
        first_step: counted from 0; the stage ends where the next begins.
        keep: K.
    """

    first_step: int
    keep: int


@functools.cache
def ratio_stages(
    schedule: str, masked_steps: int, start: float, end: float, length: int, levels: int
) -> tuple[Stage, ...]:
    """Return a schedule as a staircase of few kept counts, so that few graphs are compiled or captured.

    The range between the first ratio and the last is cut into even parts, and the count of a stage is the integer next
    to the mean of length * (1 - ratio) over the steps of its part. Each boundary is put where the tokens kept so far
    agree with the schedule's, which undoes the rounding to integers: over the run the two differ by half a stair in one
    step, unless the mean lies outside of the rounded counts, as it can where a stage is most of a run with few patches.

    Args:
        schedule: a key of `SCHEDULES`.
        masked_steps: how many steps the schedule extends over.
        start: the ratio at the first step.
        end: the ratio that it falls (or rises) to.
        length: L.
        levels: most counts that may occur.

    Returns:
        The stages, the first at step 0, with different counts; none for 0 steps, one of `kept_count` for a constant
        ratio.

    Raises:
        ValueError: an unknown schedule, a ratio outside [0, 1), no level.
    """
    mask_ratio_at(schedule, 0.0, start, end)
    check_ratio("mask_ratio", start)
    check_ratio("mask_ratio_end", end)
    if levels < 1:
        raise ValueError(f"a schedule needs at least 1 level, not {levels}")
    if masked_steps < 1:
        return ()
    if schedule == "constant" or start == end:
        return (Stage(0, kept_count(length, start)),)

    def kept(step: float) -> float:
        return length * (1.0 - mask_ratio_at(schedule, min(max(step / masked_steps, 0.0), 1.0), start, end))

    def total(first: int, last: int) -> float:
        """Sum up ``kept`` over steps; over many of them by the midpoint rule, which errs by less than 1e-6."""
        if last - first <= _POINTS:
            return math.fsum(map(kept, range(first, last)))
        width = (last - first) / _POINTS
        return width * math.fsum(kept(first - 0.5 + (i + 0.5) * width) for i in range(_POINTS))

    sign = 1 if end < start else -1

    def first_step_at(count: float) -> int:
        return bisect.bisect_left(range(masked_steps), sign * count, key=lambda step: sign * kept(step))

    edges = [length * (1.0 - start - (end - start) * i / levels) for i in range(1, levels)]
    bounds = [0, *map(first_step_at, edges), masked_steps]
    parts = [(first, last) for first, last in itertools.pairwise(bounds) if first < last]
    means = [total(first, last) / (last - first) for first, last in parts]
    counts = list(dict.fromkeys(min(max(round(mean), 1), length) for mean in means))

    stages, so_far = [Stage(0, counts[0])], 0.0  # tokens kept in the stages before the newest
    for count in counts[1:]:
        first, keep = stages[-1]
        # Until where the schedule itself keeps `count` (for the last count, to the end), both keep as many in all.
        until = masked_steps if count == counts[-1] else first_step_at(count)
        boundary = round((total(0, until) - so_far + keep * first - count * until) / (keep - count))
        boundary = min(max(boundary, first), until)
        so_far += keep * (boundary - first)
        if boundary == first:
            stages.pop()
        if boundary < masked_steps:
            stages.append(Stage(boundary, count))
    return tuple(stages)


class RatioPerSample(NamedTuple):
    """A mask ratio for each sample, from ``low`` to ``high``; from `parse_per_sample`.

    Attributes:
        by: "uniform" gives a sample any of the ratios, "noise" a group's higher ratios to its noisier samples.
        low: lowest ratio.
        high: highest ratio.
    """

    by: Literal["uniform", "noise"]
    low: float
    high: float

    @property
    def mean(self) -> float:
        """The mean ratio."""
        return (self.low + self.high) / 2

    def counts(self, length: int) -> list[int]:
        """Return what the samples of a group keep, in rising order.

        These are length * (1 - ratio) for the ratios at (i + 1/2) / GROUP of the way from ``low`` to ``high``, rounded
        to integers in [1, length] by largest remainder: their sum is round(GROUP * length * (1 - mean)), at least one
        for each.
        """
        quantiles = ((i + 0.5) / GROUP for i in reversed(range(GROUP)))
        exact = [length * (1.0 - self.low - (self.high - self.low) * q) for q in quantiles]
        counts = [max(1, math.floor(value)) for value in exact]
        left = max(GROUP, round(GROUP * length * (1.0 - self.mean))) - sum(counts)
        for _ in range(abs(left)):
            by_remainder = sorted(range(GROUP), key=lambda i: exact[i] - counts[i])
            if left > 0:
                counts[by_remainder[-1]] += 1
            else:
                counts[next(i for i in by_remainder if counts[i] > 1)] -= 1
        return sorted(counts)

    def total(self, batch: int, length: int) -> int:
        """Return N, the tokens that a batch keeps; a ValueError unless it is made of whole groups."""
        _check_groups(batch)
        return batch // GROUP * sum(self.counts(length))

    def keep(self, seed: int | Tensor, sample: Tensor, log_snr: Tensor, length: int) -> Tensor:
        """Return how many positions each sample keeps, without waiting for the device.

        Args:
            seed: the run's seed, an int or int64 of shape ().
            sample: int64, shape (B,), global indices, of whole groups: GROUP * n .. GROUP * n + GROUP - 1, and so on.
            log_snr: of the samples' times, shape (B,).
            length: L.

        Returns:
            int32, shape (B,), of sum `total`. A function of the seed and the noise levels of a sample's group alone.

        Raises:
            ValueError: a batch that is not made of whole groups.
        """
        _check_groups(len(sample))
        key = log_snr if self.by == "noise" else random_uniform(seed, sample, 1, _RATIO_STREAM)
        rank = key.view(-1, GROUP).argsort(dim=1, stable=True).argsort(dim=1)
        # Filling does not wait for the device, as copying a list from the host would.
        counts = [torch.full((), count, dtype=torch.int32, device=sample.device) for count in self.counts(length)]
        return torch.stack(counts)[rank].flatten()


def parse_per_sample(text: str, mask_ratio: float) -> RatioPerSample | None:
    """Return the ratios per sample that a text stands for.

    Args:
        text: "constant", "uniform(a,b)", "noise(a,b)", or "noise", whose ratios lie around ``mask_ratio`` and reach
            half of the way to 0 or to 1, whichever is nearer: 0.25 to 0.75 for 0.5.
        mask_ratio: the ratio of a constant.

    Returns:
        None for "constant".

    Raises:
        ValueError: anything else, ratios outside [0, 1) or not rising, "noise" for a ratio of 0.
    """
    check_ratio("mask_ratio", mask_ratio)
    if text == "constant":
        return None
    if text.startswith("sigma"):
        raise ValueError(f"mask_ratio_per_sample {text}: sigma is called noise now")
    if text == "noise":
        if mask_ratio == 0:
            raise ValueError("mask_ratio_per_sample noise varies mask_ratio, which must be above 0")
        spread = min(mask_ratio, 1.0 - mask_ratio) / 2
        return RatioPerSample("noise", mask_ratio - spread, mask_ratio + spread)
    match = re.fullmatch(r"(uniform|noise)\(([^,]*),([^,]*)\)", text.replace(" ", ""))
    try:
        low, high = map(float, match.groups()[1:]) if match else (math.nan, math.nan)
    except ValueError:
        match = None
    if not match:
        raise ValueError(
            f"mask_ratio_per_sample must be constant, noise, noise(a,b) or uniform(a,b) with ratios a < b, such as "
            f"uniform(0.3,0.7), not {text!r}"
        )
    if not 0.0 <= low < high < 1.0:
        raise ValueError(f"mask_ratio_per_sample {text}: the ratios must rise, from at least 0 to below 1")
    return RatioPerSample("noise" if match[1] == "noise" else "uniform", low, high)


def _check_groups(batch: int) -> None:
    if batch % GROUP:
        raise ValueError(
            f"a mask ratio per sample is drawn for groups of {GROUP} samples, and {batch} samples are not a multiple"
        )
