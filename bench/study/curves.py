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
    """Return the seconds per image of the recipes that were timed in turn with a dataset, of the last such run."""
    steps = [row for row in rows if row["bench"] == "study_step" and row["case"]["dataset"] == dataset]
    last = [row for row in steps if row["run"] == steps[-1]["run"]]
    return {row["variant"]: row["median_ms"] / 1e3 / row["case"]["batch"] for row in last}


def curves(rows: Iterable[Row], dataset: str, process: str, seconds: dict[str, float]) -> Curves:
    """Return the curves of a dataset and process, whose recipes were all timed; of equal rows the last one counts."""
    kept: dict[tuple[str, int], dict[float, Point]] = {}
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
        kept.setdefault((recipe, case["seed"]), {})[point.images] = point
    found: Curves = {}
    for (recipe, seed), points in kept.items():
        found.setdefault(recipe, {})[seed] = [points[images] for images in sorted(points)]
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
    """Return the first time at which a curve is at a Frechet distance or below it, infinite if it does not get there.

    For a curve that begins below it, that is the time of its first evaluation, which is too late.
    """
    if points[0].metrics["frechet"] <= frechet:
        return points[0].time
    for a, b in itertools.pairwise(points):
        if b.metrics["frechet"] <= frechet:
            share = math.log(a.metrics["frechet"] / frechet) / math.log(a.metrics["frechet"] / b.metrics["frechet"])
            return math.exp(math.log(a.time) + share * math.log(b.time / a.time))
    return math.inf


class Ahead(NamedTuple):
    """How many times faster than the dense network a recipe gets to a Frechet distance; below 1: slower.

    Attributes:
        ratio: the ratio; NaN if this time is outside of the recipe's curve.
        bound: "" if the ratio is measured, "at least" or "at most" if the curve on which it is read begins there.
    """

    ratio: float
    bound: str = ""


def ahead(dense: Sequence[Point], points: Sequence[Point]) -> Ahead:
    """Compare a recipe with the dense network.

    The distance is what the dense network has at its end or, if the recipe does not get there, what the recipe has
    after the same time.
    """
    goal = dense[-1].metrics["frechet"]
    reached = time_to(points, goal)
    if math.isfinite(reached):
        return Ahead(time_to(dense, goal) / reached, "at least" if reached == points[0].time else "")
    end = dense[-1].time
    then = metric_at(points, "time", end, "frechet")
    if math.isnan(then):
        return Ahead(math.nan)
    earlier = time_to(dense, then)
    return Ahead(earlier / end, "at most" if earlier == dense[0].time else "")


def mean(values: Iterable[float]) -> Mean:
    """Return the mean of the values of the seeds, with its confidence interval."""
    held = list(values)
    if len(held) < 2:
        return Mean(held[0] if held else math.nan, math.inf)
    half = _T[len(held)] * statistics.stdev(held) / math.sqrt(len(held))
    return Mean(statistics.fmean(held), half)


def geometric_mean(values: Iterable[float]) -> tuple[float, float, float]:
    """Return the geometric mean of ratios, and both ends of its 95 % confidence interval."""
    value, half = mean(map(math.log, values))
    return math.exp(value), math.exp(value - half), math.exp(value + half)


def _scaled(point: Point, metric: str) -> float:
    value = point.metrics[metric]
    return math.log(value) if metric == "frechet" else value
