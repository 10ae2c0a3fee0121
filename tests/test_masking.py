import itertools
import math

import pytest

from fastmask.masking import SCHEDULES, check_ratio, kept_count, mask_ratio_at

OUTSIDE = [-0.1, -1e-9, 1.0, 1.5, math.nan, math.inf]


def test_kept_count_is_the_published_formula():
    ratios = [step / 200 for step in range(200)] + [1 / 3, 2 / 3, 0.999999, 1 - 2**-53]
    for ratio in ratios:
        for length in range(1, 301):
            assert kept_count(length, ratio) == max(1, int(length * (1 - ratio))), (length, ratio)


@pytest.mark.parametrize(
    ("length", "ratio", "kept"),
    [(256, 0.5, 128), (1024, 0.5, 512), (256, 0.75, 64), (9, 0.5, 4), (3, 0.9, 1), (7, 0, 7)],
)
def test_kept_counts_of_known_runs(length, ratio, kept):
    assert kept_count(length, ratio) == kept


@pytest.mark.parametrize("ratio", OUTSIDE)
def test_ratios_outside_the_range(ratio):
    with pytest.raises(ValueError, match="mask_ratio must be at least 0 and below 1, not "):
        kept_count(16, ratio)
    with pytest.raises(ValueError, match="final_ratio must be at least 0 and below 1, not "):
        check_ratio("final_ratio", ratio)


def test_every_schedule_starts_at_the_start():
    for schedule in SCHEDULES:
        assert mask_ratio_at(schedule, 0.0, 0.5, 0.125) == 0.5, schedule


def test_every_falling_schedule_ends_at_the_end():
    for schedule in SCHEDULES.keys() - {"constant", "exp"}:
        assert mask_ratio_at(schedule, 1.0, 0.5, 0.125) == pytest.approx(0.125, abs=1e-15), schedule
    assert mask_ratio_at("constant", 1.0, 0.5, 0.125) == 0.5
    assert mask_ratio_at("exp", 1.0, 0.5, 0.0) == pytest.approx(0.5 * math.exp(-7), rel=1e-12)


def test_schedules_never_rise():
    for schedule in SCHEDULES:
        ratios = [mask_ratio_at(schedule, u / 100, 0.75, 0.25) for u in range(101)]
        falls = [later < earlier for earlier, later in itertools.pairwise(ratios)]
        assert not any(falls) if schedule == "constant" else all(falls), schedule


@pytest.mark.parametrize(
    ("schedule", "weight"),
    [
        ("constant", 1),
        ("linear", 1 / 2),
        ("exp", math.exp(-3.5)),
        ("cosine2", 1 / 2),
        ("cosine3", math.sqrt(1 / 8)),
        ("cosine4", 1 / 4),
        ("cosine5", math.sqrt(1 / 32)),
        ("cosine6", 1 / 8),
    ],
)
def test_values_halfway(schedule, weight):
    assert mask_ratio_at(schedule, 0.5, 0.5, 0.1) == pytest.approx(0.4 * weight + 0.1, rel=1e-12)


def test_the_published_schedules_are_there():
    assert set(SCHEDULES) == {"constant", "linear", "exp", *(f"cosine{power}" for power in range(2, 7))}


def test_an_unknown_schedule():
    with pytest.raises(ValueError, match="unknown mask schedule 'cosine': choose from constant, linear, "):
        mask_ratio_at("cosine", 0.5, 0.5, 0.0)


@pytest.mark.parametrize("share", [-0.01, 1.01, math.nan])
def test_a_share_outside_the_run(share):
    with pytest.raises(ValueError, match=r"the share of training done must be in \[0, 1\], not "):
        mask_ratio_at("linear", share, 0.5, 0.0)
