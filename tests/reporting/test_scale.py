import itertools

import pytest

from fastmask.reporting.scale import bins, duration, linear, logarithmic, short, time_unit, up_to


@pytest.mark.parametrize("low", [0.0, -3.0, 0.97, 1e-7])
@pytest.mark.parametrize("span", [1e-6, 0.02, 1.0, 7.3, 2e6])
def test_a_linear_scale_covers_its_values_with_round_ticks(low, span):
    scale = linear(low, low + span)
    assert scale.low <= low + 1e-9 * span
    assert scale.high >= low + span * (1 - 1e-9)
    assert 3 <= len(scale.ticks) <= 8
    steps = [after - before for before, after in itertools.pairwise(scale.ticks)]
    assert max(steps) == pytest.approx(min(steps))
    assert scale.at(scale.low) == 0
    assert scale.at(scale.high) == 1


@pytest.mark.parametrize("low", [1e-8, 0.003, 1.0, 4321.0])
@pytest.mark.parametrize("ratio", [1.0, 1.001, 1.3, 2.6, 9.0, 50.0, 1e4, 1e12])
def test_a_logarithmic_scale_covers_its_values(low, ratio):
    scale = logarithmic(low, low * ratio)
    assert scale.low < low <= low * ratio < scale.high
    assert 2 <= len(scale.ticks) <= 9
    assert all(0 <= scale.at(tick) <= 1 for tick in scale.ticks)
    assert scale.at((scale.low * scale.high) ** 0.5) == pytest.approx(0.5)


@pytest.mark.parametrize("scale", [linear, logarithmic])
@pytest.mark.parametrize(("low", "high"), [(0.9999, 0.99993), (1.0, 1 + 1e-7), (0.6, 0.6 + 1e-16), (1e-100, 1e99)])
def test_ticks_of_narrow_and_huge_ranges_have_labels_of_their_own(scale, low, high):
    found = scale(low, high)
    assert len(set(found.labels)) == len(found.labels) >= 2
    assert -1e-6 <= found.at(low) <= found.at(high) <= 1 + 1e-6


@pytest.mark.parametrize(("value", "expected"), [(0.0, (0.0, 1.0)), (2.0, (1.8, 2.2))])
def test_a_constant_has_a_scale(value, expected):
    scale = linear(value, value)
    assert (scale.low, scale.high) == pytest.approx(expected)


def test_an_x_axis_ends_at_its_last_value_with_ticks_in_its_unit():
    scale = up_to(5400.0, 3600.0)
    assert (scale.low, scale.high) == (0, 5400)
    assert scale.ticks == pytest.approx([0, 1800, 3600, 5400])
    assert scale.labels == ("0", "0.5", "1", "1.5")
    assert up_to(0.0).high == 1


def test_bins_stand_side_by_side():
    scale = bins(["a", "b"])
    assert [scale.at(tick) for tick in scale.ticks] == [0.25, 0.75]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1500, "1.5k"), (2e6, "2M"), (0.003, "0.003"), (1e-5, "1e-5"), (2.5e-4, "2.5e-4"), (-20.0, "-20"),
     (123.4, "123.4"), (916_300, "916.3k"), (1e13, "10T"), (float("nan"), "nan")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5 seconds"), (150, "2.5 minutes"), (9000, "2.5 hours"), (4e5, "4.63 days")]
)
def test_a_duration_has_the_unit_that_suits_it(seconds, text):
    assert duration(seconds) == text
    assert time_unit(seconds)[1] == text.split()[1]
