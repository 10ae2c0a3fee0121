"""Series of a chart: fewer points without losing the extremes, and a smoothed trend."""

from collections.abc import Sequence

Point = tuple[float, float]

MOST_POINTS = 600
LIMIT = 1e100  # values of charts are below it, and those of a logarithmic axis above its inverse
_NOISY = 200  # points above which a trend is drawn over them
_TREND_POINTS = 100


def finite(points: Sequence[Point]) -> list[Point]:
    """Return the points whose values are numbers that a chart can show: neither NaN nor infinite, nor near that."""
    return [(x, y) for x, y in points if abs(x) < LIMIT and abs(y) < LIMIT]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most ``most`` of the points: the first, the last, and the lowest and highest of even intervals.

    Args:
        points: points in drawing order.
        most: largest number of points, at least 4.
    """
    if len(points) <= most:
        return list(points)
    inner = points[1:-1]
    kept = [points[0]]
    buckets = (most - 2) // 2
    for i in range(buckets):
        first, end = (len(inner) * k // buckets for k in (i, i + 1))
        lowest = min(range(first, end), key=lambda k: inner[k][1])
        highest = max(range(first, end), key=lambda k: inner[k][1])
        kept += [inner[k] for k in sorted({lowest, highest})]
    return [*kept, points[-1]]


def trend(points: Sequence[Point], most: int = _TREND_POINTS) -> list[Point]:
    """Return the means of ``most`` even intervals of the points; none if there are too few points to need one."""
    if len(points) <= _NOISY:
        return []
    means = []
    for i in range(most):
        first, end = (len(points) * k // most for k in (i, i + 1))
        part = points[first:end]
        means.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return means
