"""Plots of the study: Frechet distance by training time."""

import statistics
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.study.curves import Curves, Point
from bench.study.recipes import RECIPES
from fastmask.files import atomic_write


def draw(curves: Mapping[str, Curves], titles: Mapping[str, str], path: Path) -> None:
    """Draw a panel per process: the geometric mean over the seeds of each recipe, with a dot per seed."""
    panels = [name for name, of in curves.items() if of]
    figure, axes = plt.subplots(1, len(panels), figsize=(5.4 * len(panels), 5.4), squeeze=False, sharey=True)
    colours = dict(zip(RECIPES, plt.get_cmap("tab20").colors, strict=False))
    for axis, name in zip(axes[0], panels, strict=True):
        for recipe in RECIPES:
            if seeds := curves[name].get(recipe):
                style = "--" if RECIPES[recipe].parent else "-"
                axis.plot(*_middle(seeds), style, color=colours[recipe], linewidth=1.6)
                for points in seeds.values():
                    frechet = [point.metrics["frechet"] for point in points]
                    axis.plot([point.time for point in points], frechet, ".", color=colours[recipe], markersize=3)
        axis.set(xscale="log", yscale="log", title=titles[name])
        axis.set_xlabel("training time, 1 = the dense network's")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            side.set_minor_formatter(NullFormatter())
    axes[0][0].set_ylabel("Frechet distance")
    shown = [recipe for recipe in RECIPES if any(recipe in curves[name] for name in panels)]
    lines = [Line2D([], [], color=colours[name], linestyle="--" if RECIPES[name].parent else "-") for name in shown]
    figure.legend(lines, shown, loc="lower center", ncol=5, fontsize=7, frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)


def _middle(seeds: Mapping[int, list[Point]]) -> tuple[list[float], list[float]]:
    """Return times and geometric means of the points that all seeds have."""
    shared = set.intersection(*({point.images for point in points} for points in seeds.values()))
    columns = [[point for points in seeds.values() for point in points if point.images == at] for at in sorted(shared)]
    means = [statistics.geometric_mean(point.metrics["frechet"] for point in column) for column in columns]
    return [column[0].time for column in columns], means
