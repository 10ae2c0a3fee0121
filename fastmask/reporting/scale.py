"""Axes of a chart: linear and logarithmic scales with round ticks, and numbers in few characters."""

import math
from collections.abc import Sequence
from typing import NamedTuple

_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SAME = 1e-9  # relative difference of values that are drawn as one
_TIMES = ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


class Scale(NamedTuple):
    """An axis.

    Attributes:
        low: value at its start.
        high: value at its end.
        ticks: values that are marked.
        labels: texts of the ticks.
        log: whether it is logarithmic.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """Return the place of a value, 0 at the start and 1 at the end."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


def linear(low: float, high: float, count: int = 5) -> Scale:
    """Return a linear scale that begins and ends at a tick.

    Args:
        low: smallest value.
        high: largest value.
        count: number of intervals to aim for.
    """
    if high - low <= _SAME * max(abs(low), abs(high)):
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (0.0, 1.0)
    step = _round_step((high - low) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(k * step for k in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], ticks, _labels(ticks))


def up_to(high: float, unit: float = 1.0, count: int = 5) -> Scale:
    """Return a linear scale from 0 to exactly ``high``, with ticks at round multiples of ``unit``."""
    high = high or unit
    step = _round_step(high / unit / count)
    ticks = [k * step for k in range(int(high / unit / step + 1e-9) + 1)]
    return Scale(0.0, high, tuple(tick * unit for tick in ticks), _labels(ticks))


def logarithmic(low: float, high: float) -> Scale:
    """Return a logarithmic scale of positive values, with ticks at powers of ten, 1-2-5 steps or round values."""
    if high - low <= _SAME * high:
        low, high = low / 1.1, low * 1.1
    span = math.log(high / low)
    low, high = low * math.exp(-span * 0.04), high * math.exp(span * 0.04)
    decades = math.log10(high / low)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if decades >= 3:
        every = math.ceil(decades / 6)
        candidates = [10.0**k for k in range(first, last + 1, every)]
    elif decades >= 0.8:
        candidates = [m * 10.0**k for k in range(first, last + 1) for m in (1, 2, 5)]
    else:
        finer = (linear(low, high, count).ticks for count in (4, 6, 8, 10))
        candidates = list(next(found for found in finer if sum(low <= tick <= high for tick in found) >= 3))
    ticks = tuple(tick for tick in candidates if low <= tick <= high)
    return Scale(low, high, ticks, _labels(ticks), log=True)


def bins(names: Sequence[str]) -> Scale:
    """Return a scale with a place for each of several names, at 0, 1, .."""
    return Scale(-0.5, len(names) - 0.5, tuple(map(float, range(len(names)))), tuple(names))


def time_unit(seconds: float) -> tuple[float, str]:
    """Return the seconds and the name of the unit for times of up to ``seconds``."""
    return next(((size, name) for size, name in _TIMES if seconds >= 2 * size), _TIMES[-1])


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    size, name = time_unit(seconds)
    return f"{seconds / size:.3g} {name}"


def short(value: float, digits: int = 4) -> str:
    """Return a number in few characters: 0.003, 1.5k, 2M, 1e-5.

    Args:
        value: the number.
        digits: number of significant digits.
    """
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    for size, suffix in _SUFFIXES:
        if abs(value) >= size:
            return f"{_plain(value / size, digits)}{suffix}"
    if abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.{digits - 2}e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return _plain(value, digits)


def _labels(ticks: Sequence[float]) -> tuple[str, ...]:
    """Return the texts of ticks, with as many digits as it takes to tell them apart."""
    labels = (tuple(short(tick, digits) for tick in ticks) for digits in range(4, 16))
    return next(texts for texts in labels if len(set(texts)) == len(texts))


def _plain(value: float, digits: int) -> str:
    """Return a number with so many significant digits, and never an exponent."""
    text = f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _round_step(rough: float) -> float:
    """Return the round number, 1, 2, 2.5 or 5 times a power of ten, that is the next above ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
