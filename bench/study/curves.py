"""Curves of the study: the metrics of a recipe by images and by time, and how far it is ahead of the dense network."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench.rows import Row
from bench.study.recipes import DATASETS, RECIPES

# 97.5 % quantiles of Student's t distribution, by the number of values.
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}


@dataclasses.dataclass(frozen=True)
class Point:
    """An evaluation.

    Attributes:
        images: number of images trained on.
        time: their training time, in units of that of the dense network for N images.
        metrics: metrics by name.
    """

    images: float
    time: float
    metrics: dict[str, float]


class Mean(NamedTuple):
    """A mean over the seeds, and half of its 95 % confidence interval; infinite for one seed."""

    value: float
    half: float


Curves = dict[str, dict[int, list[Point]]]  # of a dataset and process: by recipe and seed


def seconds_per_image(rows: Iterable[Row], dataset: str) -> dict[str, float]:
    """Return the seconds per image of the recipes that were timed with a dataset; the last row of each counts."""
    steps = [row for row in rows if row["bench"] == "study_step" and row["case"]["dataset"] == dataset]
    return {row["variant"]: row["median_ms"] / 1e3 / row["case"]["batch"] for row in steps}


def curves(rows: Iterable[Row], dataset: str, process: str, seconds: dict[str, float]) -> Curves:
    """Return the curves of a dataset and process, whose recipes were all timed."""
    found: Curves = {}
    whole = DATASETS[dataset].images
    for row in rows:
        case, recipe = row["case"], row["variant"]
        if row["bench"] != "study" or (case["dataset"], case["process"]) != (dataset, process):
            continue
        before = case["start"] * whole
        spent = (case["images"] - before) * seconds[recipe]
        if before:
            spent += before * seconds[RECIPES[recipe].parent]
        point = Point(case["images"], spent / (whole * seconds["dense"]), row["metrics"])
        found.setdefault(recipe, {}).setdefault(case["seed"], []).append(point)
    for seeds in found.values():
        for points in seeds.values():
            points.sort(key=lambda point: point.images)
    return found


def metric_at(points: Sequence[Point], axis: str, place: float, metric: str) -> float:
    """Return a metric of a curve at some images or time, interpolated in their logarithm; NaN outside of the curve.

    The Frechet distance is interpolated in its logarithm too.
    """
    xs = [math.log(getattr(point, axis)) for point in points]
    ys = [_scaled(point, metric) for point in points]
    x = math.log(place)
    for (x0, x1), (y0, y1) in zip(itertools.pairwise(xs), itertools.pairwise(ys), strict=True):
        if x0 - 1e-9 <= x <= x1 + 1e-9:
            y = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
            return math.exp(y) if metric == "frechet" else y
    return math.nan


def time_to(points: Sequence[Point], frechet: float) -> float:
    """Return the first time at which a curve is at a Frechet distance, infinite if it does not get there.

    A curve that begins below it returns NaN: when it got there was not measured.
    """
    if points[0].metrics["frechet"] <= frechet:
        return points[0].time if points[0].metrics["frechet"] == frechet else math.nan
    for a, b in itertools.pairwise(points):
        if b.metrics["frechet"] <= frechet:
            share = math.log(a.metrics["frechet"] / frechet) / math.log(a.metrics["frechet"] / b.metrics["frechet"])
            return math.exp(math.log(a.time) + share * math.log(b.time / a.time))
    return math.inf


def ahead(dense: Sequence[Point], points: Sequence[Point]) -> float:
    """Return how many times faster than the dense network a recipe gets to a Frechet distance; below 1: slower.

    The distance is what the dense network has at its end or, if the recipe does not get there, what the recipe has
    after the same time. NaN if neither is on the curves.
    """
    goal = dense[-1].metrics["frechet"]
    reached = time_to(points, goal)
    if math.isfinite(reached):
        return dense[-1].time / reached
    then = metric_at(points, "time", dense[-1].time, "frechet")
    return math.nan if math.isnan(then) else time_to(dense, then) / dense[-1].time


def mean(values: Iterable[float]) -> Mean:
    """Return the mean of the values of the seeds, with its confidence interval."""
    held = list(values)
    if len(held) < 2:
        return Mean(held[0] if held else math.nan, math.inf)
    half = _T[len(held)] * statistics.stdev(held) / math.sqrt(len(held))
    return Mean(statistics.fmean(held), half)


def geometric_mean(values: Iterable[float]) -> tuple[float, float, float]:
    """Return the geometric mean of ratios, and both ends of its 95 % confidence interval."""
    logarithms = mean(map(math.log, values))
    return tuple(math.exp(logarithms.value + side * logarithms.half) for side in (0, -1, 1))  # type: ignore[return-value]


def _scaled(point: Point, metric: str) -> float:
    value = point.metrics[metric]
    return math.log(value) if metric == "frechet" else value
