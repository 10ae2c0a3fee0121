import math
import random

import pytest

from fastmask.reporting.series import MOST_POINTS, finite, thinned, trend


def noisy(count):
    drawn = random.Random(0)
    return [(float(i), drawn.gauss(0, 1)) for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, MOST_POINTS, MOST_POINTS + 1, 10_000, 100_001])
def test_fewer_points_keep_the_ends_and_the_extremes(count):
    points = noisy(count)
    kept = thinned(points)
    assert len(kept) == count if count <= MOST_POINTS else MOST_POINTS * 0.9 < len(kept) <= MOST_POINTS
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    for extreme in (min, max):
        assert extreme(kept, key=lambda point: point[1]) == extreme(points, key=lambda point: point[1])
    assert kept == sorted(kept)
    assert set(kept) <= set(points)


def test_a_single_spike_is_kept():
    points = [(float(i), 1.0) for i in range(50_000)]
    points[31_415] = (31_415.0, 9.0)
    assert (31_415.0, 9.0) in thinned(points)


def test_the_trend_is_the_mean_of_even_intervals():
    points = [(float(i), 3.0 + (-1) ** i) for i in range(1000)]
    means = trend(points)
    assert len(means) == 100
    assert means[0] == (4.5, 3.0)
    assert {y for _, y in means} == {3.0}
    assert trend(points[:200]) == []


def test_values_that_no_chart_can_show_are_left_out():
    assert finite([(0.0, 1.0), (1.0, math.nan), (2.0, math.inf), (3.0, 2.0), (4.0, 10**400)]) == [
        (0.0, 1.0),
        (3.0, 2.0),
    ]
