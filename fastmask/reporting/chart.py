"""Line charts as HTML with inline SVG: lines in an SVG that stretches to its box, texts beside it at their own size."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fastmask.reporting.scale import Scale, linear, logarithmic, short
from fastmask.reporting.series import LIMIT, Point, finite, thinned, trend
from fastmask.reporting.text import safe

_WIDTH, _HEIGHT = 100_000, 10_000  # of the SVG's own coordinates
_COLORS, _LEVELS = 8, 6  # of the style sheet
_DASHES = ("", " dash", " dots")


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
        label: its name.
        style: class names of the style sheet.
        points: its points (x, y) by the name of the x axis; an axis on which it has none can be missing.
    """

    label: str
    style: str
    points: Mapping[str, Sequence[Point]]


class XAxis(NamedTuple):
    """An x axis of a chart.

    Attributes:
        key: its name in `Line.points` and in the style sheet.
        title: its text.
        scale: its scale.
        unit: factor from what is shown to the values of the points, such as 60 for minutes of seconds.
    """

    key: str
    title: str
    scale: Scale
    unit: float = 1.0


def style_of(index: int) -> str:
    """Return the style of the index-th run: a colour, and another dash where colours repeat."""
    return f"c{index % _COLORS}{_DASHES[index // _COLORS % len(_DASHES)]}"


def level_style(index: int, count: int) -> str:
    """Return the style of the index-th of ``count`` ordered levels."""
    return f"v{round(index * (_LEVELS - 1) / max(1, count - 1))}"


def chart(
    title: str,
    lines: Sequence[Line],
    axes: Sequence[XAxis],
    *,
    log: bool = False,
    from_zero: bool = False,
    unit: str = "",
    wide: bool = False,
    trend_only: bool = False,
    markers: bool = False,
) -> str:
    """Return a figure with a plot for each x axis, of which the style sheet shows one; empty without any points.

    Args:
        title: its title.
        lines: the lines; values that are not finite are left out.
        axes: the x axes.
        log: whether the y axis is logarithmic, if all values are positive.
        from_zero: whether the y axis includes 0.
        unit: unit of the y axis.
        wide: whether it takes the whole width of the page.
        trend_only: whether to leave out the single points of a line that has a trend.
        markers: whether to mark the points.
    """
    drawn = [Line(line.label, line.style, {key: finite(line.points[key]) for key in line.points}) for line in lines]
    drawn = [line for line in drawn if any(line.points.values())]
    if trend_only:
        drawn = [line._replace(points={key: trend(own) or own for key, own in line.points.items()}) for line in drawn]
    values = [y for line in drawn for points in line.points.values() for _, y in points]
    if not values:
        return ""
    log = log and min(values) > 1 / LIMIT
    if log:
        scale = logarithmic(min(values), max(values))
    else:
        scale = linear(min(0.0, *values) if from_zero else min(values), max(0.0, *values) if from_zero else max(values))
    notes = [unit] * bool(unit) + ["log scale"] * log
    note = f' <span class="note">{safe(", ".join(notes))}</span>' if notes else ""
    legend = _legend(drawn) if len(drawn) > 1 else ""
    plots = "".join(_plot(title, drawn, axis, scale, markers=markers) for axis in axes)
    kind = "chart wide" if wide else "chart"
    return f'<figure class="{kind}"><figcaption><h3>{safe(title)}{note}</h3></figcaption>{legend}{plots}</figure>\n'


def _legend(lines: Sequence[Line]) -> str:
    items = "".join(f'<li><i class="swatch {line.style}"></i>{safe(line.label)}</li>' for line in lines)
    return f'<ul class="legend">{items}</ul>'


def _plot(title: str, lines: Sequence[Line], axis: XAxis, scale: Scale, *, markers: bool) -> str:
    """Return the plot of one x axis."""
    shown = [line for line in lines if line.points.get(axis.key)]
    if not shown:
        return f'<p class="plot-none by-{axis.key}">{safe(axis.title)}: not recorded</p>'
    x_ticks, y_ticks = _ticks(axis.scale), _ticks(scale)
    grid = "".join(f"M0 {_y(at)}H{_WIDTH}" for at, _ in y_ticks)
    paths = [f'<path class="grid" d="{grid}"/><path class="base" d="M0 {_HEIGHT}H{_WIDTH}"/>']
    for line in shown:
        points = line.points[axis.key]
        mean = trend(points)
        if mean:
            path = _path(thinned(points), axis.scale, scale)
            paths.append(f'<path class="line faint {line.style}" d="{path}"/>')
        path = _path(mean or thinned(points), axis.scale, scale)
        paths.append(f'<path class="line {line.style}" data-label="{safe(line.label)}" d="{path}"/>')
        if markers or len(points) == 1:
            dots = "".join(f"M{_x(axis.scale.at(x))} {_y(scale.at(y))}h0" for x, y in thinned(points))
            paths.append(f'<path class="marker {line.style}" d="{dots}"/>')
    labels = [f'<span class="y" style="bottom:{at:.2%}">{safe(label)}</span>' for at, label in y_ticks]
    labels += [f'<span class="x" style="left:{at:.2%}">{safe(label)}</span>' for at, label in x_ticks]
    ranges = {
        "x": [axis.scale.low / axis.unit, axis.scale.high / axis.unit],
        "y": [scale.low, scale.high],
        "log": scale.log,
        "name": axis.title,
        "bins": list(axis.scale.labels) if axis.key == "bins" else None,
    }
    return (
        f'<div class="plot by-{axis.key}" data-ranges="{safe(json.dumps(ranges))}">'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{safe(_described(title, shown, axis))}">{"".join(paths)}</svg>{"".join(labels)}'
        f'<span class="axis">{safe(axis.title)}</span></div>'
    )


def _described(title: str, lines: Sequence[Line], axis: XAxis) -> str:
    """Return the chart in words, for who does not see it."""
    texts = []
    for line in lines:
        values = [y for _, y in line.points[axis.key]]
        texts.append(
            f"{line.label}: first {short(values[0])}, last {short(values[-1])}, lowest {short(min(values))}, "
            f"highest {short(max(values))}"
        )
    return f"{title} by {axis.title}. {'; '.join(texts)}."


def _ticks(scale: Scale) -> list[tuple[float, str]]:
    return [(scale.at(tick), label) for tick, label in zip(scale.ticks, scale.labels, strict=True)]


def _path(points: Sequence[Point], x_scale: Scale, y_scale: Scale) -> str:
    places = ((_x(x_scale.at(x)), _y(y_scale.at(y))) for x, y in points)
    return "M" + "L".join(f"{x} {y}" for x, y in places)


def _x(at: float) -> int:
    return math.floor(at * _WIDTH + 0.5)


def _y(at: float) -> int:
    return math.floor((1 - at) * _HEIGHT + 0.5)
