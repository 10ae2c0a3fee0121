import html
import json
import math
import re

import pytest
from run_folders import Page

from fastmask.reporting.chart import Line, XAxis, chart, level_style, style_of
from fastmask.reporting.scale import up_to

STEPS, TIME = XAxis("steps", "steps", up_to(100.0)), XAxis("time", "training time, minutes", up_to(7200.0, 60.0), 60.0)


def points_of(page, label):
    path = next(own["d"] for tag, own in page.tags if own.get("data-label") == label)
    return [tuple(map(int, pair.split())) for pair in path[1:].split("L")]


def test_points_stand_where_their_values_are():
    line = Line("a", style_of(0), {"steps": [(0.0, 0.0), (50.0, 5.0), (100.0, 10.0)]})
    page = Page(chart("Loss", [line], [STEPS]))
    assert points_of(page, "a") == [(0, 10_000), (50_000, 5000), (100_000, 0)]
    assert [own["style"] for own in page.all("span", "y")] == [f"bottom:{at}.00%" for at in (0, 20, 40, 60, 80, 100)]
    assert "Loss by steps. a: first 0, last 10, lowest 0, highest 10." in str(page.tags)


def test_a_logarithmic_axis_needs_positive_values():
    rising = {"steps": [(0.0, 0.01), (50.0, 1.0), (100.0, 100.0)]}
    assert points_of(Page(chart("Loss", [Line("a", "c0", rising)], [STEPS], log=True)), "a")[1] == (50_000, 5000)
    touching = {"steps": [*rising["steps"], (100.0, 0.0)]}
    page = chart("Loss", [Line("a", "c0", touching)], [STEPS], log=True)
    assert "log scale" not in page
    assert points_of(Page(page), "a")[1][1] == 9900


def test_the_script_can_read_values_back():
    """As the hover does: from the coordinates and the ranges beside them."""
    line = Line("a", "c0", {"time": [(60.0, 0.3), (3600.0, 0.05), (7200.0, 2.0)]})
    page = Page(chart("Loss", [line], [TIME], log=True))
    ranges = json.loads(page.all("div", "plot")[0]["data-ranges"])
    assert ranges["x"] == [0, 120]
    low, high = ranges["y"]
    found = [low * (high / low) ** (1 - y / 10_000) for _, y in points_of(page, "a")]
    assert found == pytest.approx([0.3, 0.05, 2.0], rel=1e-3)


def test_every_axis_has_a_plot_or_says_that_it_has_none():
    line = Line("a", "c0", {"steps": [(1.0, 1.0), (2.0, 2.0)], "time": []})
    page = Page(chart("Loss", [line], [STEPS, TIME]))
    assert [own["class"] for own in page.all("div", "plot")] == ["plot by-steps"]
    assert "training time, minutes: not recorded" in page.text
    assert chart("Loss", [Line("a", "c0", {"steps": [(1.0, math.nan)]})], [STEPS]) == ""


def test_many_points_are_drawn_faint_behind_their_trend():
    line = Line("a", "c0", {"steps": [(i / 1000, 1.0 + i % 2) for i in range(100_000)]})
    text = chart("Loss", [line], [STEPS])
    assert len(text) < 15_000
    assert len(Page(text).all("path", "faint")) == 1
    assert len(points_of(Page(text), "a")) == 100
    assert not Page(chart("Loss", [line], [STEPS], trend_only=True)).all("path", "faint")


def test_a_single_point_is_marked():
    line = Line("a", "c0", {"steps": [(10.0, 1.0)]})
    assert len(Page(chart("Loss", [line], [STEPS])).all("path", "marker")) == 1


def test_names_are_escaped():
    hostile = "<script>\"'&"
    text = chart(hostile, [Line(hostile, "c0", {"steps": [(1.0, 1.0)]})] * 2, [STEPS], unit=hostile)
    assert "<script" not in text
    assert Page(text).text.count(hostile) == 4
    assert html.escape(hostile) in re.findall(r'data-label="([^"]*)"', text)


def test_runs_differ_in_colour_or_dash():
    assert len({style_of(i) for i in range(24)}) == 24
    assert [level_style(i, 3) for i in range(3)] == ["v0", "v2", "v5"]
    assert level_style(0, 1) == "v0"
