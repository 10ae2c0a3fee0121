"""What fields of configurations declare, and the messages of their checks."""

import dataclasses
import math

import pytest

from fastmask.fields import check_at_least, check_share, fixed, free, free_within, recorded, recorded_within, unknown


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    rate: float = 0.5
    steps: int = free(3)
    width: int = fixed(8, "the weights have it")
    spread: tuple[float, ...] = recorded((1.0,))
    way: str = free_within("a1", len, "its length is kept")
    coef: float = recorded_within(0.5, bool, "it is on")


def test_fields_have_their_defaults_and_say_what_may_change():
    assert Config() == Config(rate=0.5, steps=3, width=8, spread=(1.0,))
    rules = {field.name: dict(field.metadata) for field in dataclasses.fields(Config)}
    assert rules == {
        "rate": {},
        "steps": {"free": True},
        "width": {"fixed": "the weights have it"},
        "spread": {"recorded": True},
        "way": {"within": (len, "its length is kept")},
        "coef": {"recorded_within": (bool, "it is on")},
    }


@pytest.mark.parametrize("value", [2, -1, math.inf, math.nan])
def test_lower_bounds(value):
    check_at_least(Config(), rate=0, steps=3)
    with pytest.raises(ValueError, match=f"^steps must be at least 3, not {value}$"):
        check_at_least(Config(steps=value), rate=0, steps=3)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_shares(value):
    for good in (0.0, 0.5, 1.0):
        check_share(Config(rate=good), "rate")
    with pytest.raises(ValueError, match=rf"^rate must be in \[0, 1\], not {value}$"):
        check_share(Config(rate=value), "rate")


def test_names_that_are_not_known():
    assert unknown("field", "widht", ["width", "steps"]) == "unknown field 'widht': did you mean width?"
    assert unknown("field", "zzz", iter(["width", "steps"])) == "unknown field 'zzz': did you mean width or steps?"
