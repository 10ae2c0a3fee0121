"""Mask ratios: schedules over a run, and ratios per sample (arXiv 2306.09305, section 3.2 and appendix).

With a ratio per sample, every `GROUP` consecutive samples share the same set of kept counts in random order, so a batch
has a constant number of kept tokens and one compiled graph serves every batch.
"""

import bisect
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastmask.fields import check_at_least, unknown
from fastmask.kernels import Mask, random_uniform

# Each schedule maps u, the fraction of training done, to the weight of the initial ratio relative to the final one.
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

# Samples GROUP * n .. GROUP * n + GROUP - 1 of a run share one multiset of kept counts.
GROUP = 8
_RATIO_STREAM, _GROUP_STREAM = 7, 9  # of the counter-based generator; draws.py lists all streams
_POINTS = 1024  # points of the midpoint rule for long parts of a schedule


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Masking:
    """Mask ratio, its schedule over the steps and its distribution over the samples."""

    mask_ratio: float = 0.5
    """Fraction of the patches dropped before the encoder, in [0, 1)."""
    mask_ratio_end: float = 0.0
    """Final mask ratio of a decaying schedule."""
    mask_schedule: str = "constant"
    """Schedule of the mask ratio over the masked steps: constant, linear, exp, cosine2 .. cosine6."""
    mask_levels: int = 8
    """Number of distinct kept counts of a decaying schedule."""
    mask_ratio_per_sample: str = "constant"
    """Mask ratio per sample: constant; uniform(a,b); noise(a,b), with b at the highest noise; or noise, a range around
    --mask-ratio."""
    mask_pattern: Literal["random", "structured"] = "random"
    """Which patches are kept: random ones, or structured, a random one of each group of 2 x 2 (mask ratio 0.75)."""
    unmask_steps: int = 0
    """Number of final steps without masking (unmasked tuning)."""

    def check(self, *, max_steps: int, micro_batch: int, can_mask: bool) -> None:
        """Raise a ValueError for the first invalid field.

        Args:
            max_steps: number of steps of the run.
            micro_batch: images per forward pass.
            can_mask: whether the network can be trained on a part of the tokens.
        """
        check_ratio("mask_ratio", self.mask_ratio)
        check_ratio("mask_ratio_end", self.mask_ratio_end)
        if self.mask_schedule not in SCHEDULES:
            raise ValueError(unknown("mask_schedule", self.mask_schedule, SCHEDULES))
        if not can_mask and (self.mask_ratio or self.mask_ratio_end):
            raise ValueError("a network without a decoder (decoder_depth 0) trains unmasked: set mask_ratio 0")
        check_at_least(self, mask_levels=1, unmask_steps=0)
        if self.unmask_steps > max_steps:
            raise ValueError(f"unmask_steps {self.unmask_steps} is more than max_steps {max_steps}")
        if self.mask_pattern not in ("random", "structured"):
            raise ValueError(unknown("mask_pattern", self.mask_pattern, ("random", "structured")))
        if self.structured and (self.mask_ratio, self.mask_schedule, self.per_sample) != (0.75, "constant", None):
            raise ValueError(
                "mask_pattern structured keeps one patch of four: give mask_ratio 0.75, mask_schedule constant and "
                "mask_ratio_per_sample constant, or mask_pattern random"
            )
        if self.per_sample is not None:
            self._check_per_sample(self.per_sample, micro_batch)

    def _check_per_sample(self, per_sample: "RatioPerSample", micro_batch: int) -> None:
        text = f"mask_ratio_per_sample {self.mask_ratio_per_sample}"
        if self.mask_schedule != "constant":
            raise ValueError(f"{text} goes with mask_schedule constant, not {self.mask_schedule}")
        if abs(per_sample.mean - self.mask_ratio) > 1e-6:
            raise ValueError(
                f"{text} has a mean of {per_sample.mean:g}, and mask_ratio is {self.mask_ratio:g}: give the same to "
                f"both"
            )
        if micro_batch % GROUP:
            raise ValueError(
                f"{text} is drawn for groups of {GROUP} samples: the images computed at a time (batch_size or "
                f"micro_batch_size), {micro_batch}, must be a multiple"
            )

    @property
    def structured(self) -> bool:
        """Whether one patch of each group of 2 x 2 is kept."""
        return self.mask_pattern == "structured"

    def masked_steps(self, max_steps: int) -> int:
        """Return the number of steps before the unmasked stage, of a run of ``max_steps``."""
        return max_steps - self.unmask_steps

    def ratio_at(self, step: int, max_steps: int) -> float:
        """Return the mask ratio of a step, counted from 0, of a run of ``max_steps``."""
        masked = self.masked_steps(max_steps)
        if step >= masked:
            return 0.0
        return mask_ratio_at(self.mask_schedule, step / masked, self.mask_ratio, self.mask_ratio_end)

    def lowest_ratio(self, max_steps: int) -> float:
        """Return the lowest mask ratio of a run; the schedules are monotonic."""
        return min(self.ratio_at(step, max_steps) for step in (0, max_steps - 1))

    def stages(self, length: int, max_steps: int) -> tuple["Stage", ...]:
        """Return the stages of a run, with K for ``length`` positions; the last may be unmasked."""
        first_unmasked = self.masked_steps(max_steps)
        masked = ratio_stages(
            self.mask_schedule, first_unmasked, self.mask_ratio, self.mask_ratio_end, length, self.mask_levels
        )
        is_over = bool(masked) and masked[-1].keep == length
        return masked if is_over or not self.unmask_steps else (*masked, Stage(first_unmasked, length))

    def kept_at(self, step: int, length: int, max_steps: int) -> int:
        """Return the number of kept positions of a step, counted from 0; the mean with a ratio per sample."""
        return [stage.keep for stage in self.stages(length, max_steps) if stage.first_step <= step][-1]

    @property
    def per_sample(self) -> "RatioPerSample | None":
        """Distribution of the per-sample mask ratio in the masked steps; None for a constant ratio."""
        return parse_per_sample(self.mask_ratio_per_sample, self.mask_ratio)


def structured_mask(batch: int, side: int, *, seed: int | Tensor, offset: int | Tensor, device: torch.device) -> Mask:
    """Return masks that keep one position of each group of 2 x 2, uniformly random (SPRINT, arXiv 2510.21986).

    Args:
        batch: B.
        side: side of the grid of patches; L is its square.
        seed: the seed, an int, or int64 of shape () on ``device``.
        offset: global index of the first sample; the mask of sample b depends on the seed and ``offset + b`` only.
        device: device of the mask.

    Returns:
        int32 indices, K = L / 4: row k of the kept positions is that of group k, in row-major order of the groups.

    Raises:
        ValueError: an odd side.
    """
    if side < 2 or side % 2:
        raise ValueError(f"a structured mask needs a grid of groups of 2 x 2 patches, not {side} x {side} patches")
    half = side // 2
    keep = half * half
    sample = torch.arange(batch, dtype=torch.int64, device=device) + offset
    choice = (random_uniform(seed, sample, keep, _GROUP_STREAM) * 4).long()  # (B, K), which of the group's four
    group = torch.arange(keep, device=device)
    corner = group // half * 2 * side + group % half * 2  # position of the group's first patch
    ids_keep = corner + choice // 2 * side + choice % 2
    position = torch.arange(side * side, device=device)
    row, column = position // side, position % side
    group, own = row // 2 * half + column // 2, row % 2 * 2 + column % 2
    chosen = choice[:, group]  # (B, L)
    dropped = keep + 3 * group + own - (own > chosen).long()  # the other three of each group follow the kept ones
    ids_restore = torch.where(own == chosen, group, dropped)
    return Mask(ids_keep.int(), ids_restore.int())


def check_ratio(name: str, ratio: float) -> None:
    """Raise a ValueError unless ``ratio`` is in [0, 1)."""
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"{name} must be at least 0 and below 1, not {ratio}")


def kept_count(length: int, ratio: float) -> int:
    """Return K, the number of kept positions at a mask ratio: int(length * (1 - ratio)), at least 1."""
    check_ratio("mask_ratio", ratio)
    return max(1, int(length * (1.0 - ratio)))


def mask_ratio_at(schedule: str, share_done: float, start: float, end: float) -> float:
    """Return the mask ratio of a schedule.

    Args:
        schedule: a key of `SCHEDULES`.
        share_done: u, the fraction of training done, in [0, 1].
        start: r, the ratio at u = 0.
        end: m, the final ratio; "exp" reaches it to within 0.1 %.

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
    """Approximate a schedule by a staircase of few kept counts, so that few graphs are compiled or captured.

    The range from the first to the last ratio is split evenly, and the count of a stage is the mean of
    length * (1 - ratio) over its steps, rounded to an integer. Each boundary is placed where the cumulative number of
    kept tokens matches the schedule, which corrects the rounding: over the run the totals differ by at most half a
    stair in one step, unless the mean lies outside of the rounded counts (a stage that spans most of a run with few
    patches).

    Args:
        schedule: a key of `SCHEDULES`.
        masked_steps: number of steps of the schedule.
        start: ratio at the first step.
        end: final ratio, lower or higher than ``start``.
        length: L.
        levels: maximum number of distinct counts.

    Returns:
        The stages, the first at step 0, with distinct counts; empty for 0 steps, a single stage with `kept_count` for a
        constant ratio.

    Raises:
        ValueError: an unknown schedule, a ratio outside [0, 1), or fewer than 1 level.
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
        """Sum ``kept`` over steps; long ranges use the midpoint rule, with an error below 1e-6."""
        if last - first <= _POINTS:
            return math.fsum(map(kept, range(first, last)))
        width = (last - first) / _POINTS
        return width * math.fsum(kept(first - 0.5 + (i + 0.5) * width) for i in range(_POINTS))

    sign = 1 if end < start else -1

    def first_step_at(count: float) -> int:
        return bisect.bisect_left(range(masked_steps), sign * count, key=lambda step: sign * kept(step))

    # Split the range of the ratio evenly; the rounded mean of each part is its count.
    edges = [length * (1.0 - start - (end - start) * i / levels) for i in range(1, levels)]
    bounds = [0, *map(first_step_at, edges), masked_steps]
    parts = [(first, last) for first, last in itertools.pairwise(bounds) if first < last]
    means = [total(first, last) / (last - first) for first, last in parts]
    counts = list(dict.fromkeys(min(max(round(mean), 1), length) for mean in means))

    # Place each boundary where the cumulative number of kept tokens matches the schedule.
    stages, so_far = [Stage(0, counts[0])], 0.0  # so_far: tokens kept before the newest stage
    for count in counts[1:]:
        first, keep = stages[-1]
        # Up to the step where the schedule itself keeps `count` (for the last one, the end), totals are equal.
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
    """Distribution of the per-sample mask ratio in [``low``, ``high``]; created by `parse_per_sample`.

    Attributes:
        by: "uniform" assigns the ratios of a group at random, "noise" assigns higher ratios to noisier samples.
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
        """Return the kept counts of a group, in ascending order.

        These are length * (1 - ratio) for the ratios at (i + 1/2) / GROUP of the way from ``low`` to ``high``, rounded
        to integers in [1, length] by largest remainder: their sum is round(GROUP * length * (1 - mean)), at least
        GROUP.
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
        """Return N, the number of kept tokens of a batch; a ValueError unless it consists of whole groups."""
        _check_groups(batch)
        return batch // GROUP * sum(self.counts(length))

    def keep(self, seed: int | Tensor, sample: Tensor, log_snr: Tensor, length: int) -> Tensor:
        """Return the number of kept positions of each sample, without a host sync.

        Args:
            seed: the run's seed, an int or int64 of shape ().
            sample: int64, shape (B,), global indices, of whole groups: GROUP * n .. GROUP * n + GROUP - 1, and so on.
            log_snr: log-SNR of each sample, shape (B,).
            length: L.

        Returns:
            int32, shape (B,), with sum `total`; a function of the seed and the noise levels of a sample's group only.

        Raises:
            ValueError: a batch that does not consist of whole groups.
        """
        _check_groups(len(sample))
        key = log_snr if self.by == "noise" else random_uniform(seed, sample, 1, _RATIO_STREAM)
        rank = key.view(-1, GROUP).argsort(dim=1, stable=True).argsort(dim=1)
        # torch.full avoids the host sync of copying a list to the device.
        counts = [torch.full((), count, dtype=torch.int32, device=sample.device) for count in self.counts(length)]
        return torch.stack(counts)[rank].flatten()


def parse_per_sample(text: str, mask_ratio: float) -> RatioPerSample | None:
    """Parse a per-sample mask ratio.

    Args:
        text: "constant", "uniform(a,b)", "noise(a,b)", or "noise", a range around ``mask_ratio`` that extends halfway
            to 0 or 1, whichever is nearer: 0.25 to 0.75 for 0.5.
        mask_ratio: the constant ratio.

    Returns:
        None for "constant".

    Raises:
        ValueError: other text, ratios outside [0, 1) or not ascending, "noise" with a ratio of 0.
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
