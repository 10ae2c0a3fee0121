"""docs/study.md and its plots, made from the rows of the study."""

import math
from pathlib import Path

from bench.report.compare import checked, machine_of
from bench.report.tables import header, line
from bench.rows import Row
from bench.study.curves import Curves, Mean, Point, ahead, curves, geometric_mean, mean, metric_at, seconds_per_image
from bench.study.plot import draw
from bench.study.recipes import DATASETS, LR, PROCESSES, RECIPES, SAMPLING, SEEDS, TUNED_FOR, TUNING_LR
from bench.study.runs import rows_file
from fastmask.files import atomic_write

_TITLES = {"edm": "EDM", "flow": "flow matching"}
_COLUMNS = ["recipe", "time of a step", "Frechet, equal images", "Frechet, equal time", "recall", "coverage"]
_COLUMNS += ["agreement", "ahead of dense"]


def write(results: Path, docs: Path) -> None:
    """Write the report and the plots; a ValueError if nothing is measured."""
    lines = [*_head()]
    for dataset in DATASETS:
        path = rows_file(dataset, results)
        rows = checked(path) if path.exists() else []
        seconds = seconds_per_image(rows, dataset)
        measured = [row for row in rows if row["bench"] == "study" and _is_timed(row, seconds)]
        if not measured:
            continue
        every = {process: curves(measured, dataset, process, seconds) for process in PROCESSES}
        found = {process: of for process, of in every.items() if "dense" in of and len(of) > 1}
        if not found:
            continue
        steps = [row for row in rows if row["bench"] == "study_step"]
        lines += ["", f"## {dataset.capitalize()}: {DATASETS[dataset].what}", "", _machines(measured, steps), ""]
        for process, of in found.items():
            lines += [f"### {_TITLES[process]}", "", *table(of, seconds), ""]
        draw(found, {process: f"{dataset}, {_TITLES[process]}" for process in found}, docs / f"study-{dataset}.png")
        lines.append(f"![Frechet distance by training time, {dataset}](study-{dataset}.png)")
    if len(lines) == len(_head()):
        raise ValueError(f"{results} holds no rows of the study: run python -m bench.study, then --time")
    with atomic_write(docs / "study.md") as partial:
        partial.write_text("\n".join(lines) + "\n")


def table(of: Curves, seconds: dict[str, float]) -> list[str]:
    """Return the table of a dataset and process: a line per recipe, each value with its confidence interval."""
    lines = header(_COLUMNS)
    dense = of["dense"]
    for recipe in RECIPES:
        if recipe not in of:
            continue
        both = [(dense[seed], points) for seed, points in of[recipe].items() if seed in dense]
        at_time = {name: _mean_at(both, "time", name) for name in ("frechet", "recall", "coverage", "agreement")}
        cells = [
            f"`{recipe}`: {RECIPES[recipe].what}",
            f"{seconds[recipe] / seconds['dense']:.2f}",
            _mean_at(both, "images", "frechet"),
        ]
        lines.append(line([*cells, *at_time.values(), _ahead(recipe, both)]))
    return lines


def _mean_at(both: list[tuple[list[Point], list[Point]]], axis: str, metric: str) -> str:
    """Return the mean over the seeds of a metric, at the images or the time at which the dense network ends."""
    values = [metric_at(points, axis, getattr(dense[-1], axis), metric) for dense, points in both]
    known = [value for value in values if not math.isnan(value)]
    return _shown(mean(known)) if known and len(known) == len(values) else "outside its curve"


def _ahead(recipe: str, both: list[tuple[list[Point], list[Point]]]) -> str:
    if recipe == "dense":
        return "1"
    found = [ahead(dense, points) for dense, points in both]
    if any(math.isnan(each.ratio) for each in found):
        return "outside its curve"
    middle, low, high = geometric_mean(each.ratio for each in found)
    bounds = sorted({each.bound for each in found if each.bound})
    if bounds:
        return f"{' and '.join(bounds)} {middle:.2f}x"
    return f"{middle:.2f}x" + (f" [{low:.2f}, {high:.2f}]" if len(found) > 1 else " (one seed)")


def _shown(value: Mean) -> str:
    digits = 3 if value.value < 1 else 2
    return f"{value.value:.{digits}f}" + (f" ± {value.half:.{digits}f}" if math.isfinite(value.half) else " (one seed)")


def _is_timed(row: Row, seconds: dict[str, float]) -> bool:
    parent = RECIPES[row["variant"]].parent if row["variant"] in RECIPES else ""
    return row["variant"] in RECIPES and {"dense", row["variant"], parent or "dense"} <= set(seconds)


def _machines(rows: list[Row], steps: list[Row]) -> str:
    timed = ", ".join(sorted({machine_of(row) for row in steps}))
    seeds = sorted({row["case"]["seed"] for row in rows})
    count = len({(row["variant"], *row["case"].values()) for row in rows})
    of = f"{len(seeds)} of {len(SEEDS)} seeds" if len(seeds) < len(SEEDS) else f"{len(seeds)} seeds"
    whole = DATASETS[rows[0]["case"]["dataset"]].images
    return f"N = {whole:,} images; {count} evaluations of {rows[0]['samples']:,} samples; {of}; steps timed on {timed}."


def _head() -> list[str]:
    return [
        "# Does masking pay? A study on small images",
        "",
        "Made from the rows of `bench/results/study-*.jsonl` by `python -m bench.study --report`; the rows by",
        "`python -m bench.study` and, on a quiet machine, `python -m bench.study --time`.",
        "",
        "Every recipe trains the same blocks (width 64, 6 blocks, 2 heads) at the same constant learning rate "
        f"({LR:g}) with the same optimizer and EMA. A decoder or a mixer (two blocks of width 32) adds 12 % of "
        "parameters, SPRINT 2 %, TREAD none. The EMA is evaluated along each run, without guidance, by "
        f"{SAMPLING.sample_steps} steps of {SAMPLING.solver}; SPRINT trains with its path drop all the same. Recipes "
        f'that continue ("then ..") leave their run at several points for {TUNED_FOR:g} N images without masking at a '
        f"learning rate of {TUNING_LR:g}; the dense network does so too, since a lower learning rate helps by itself.",
        "",
        "*Equal images* is after N images, *equal time* after the time in which the dense network sees N images; "
        "values between evaluations are interpolated. *Time of a step* is relative to the dense network, all recipes "
        "timed in turn in one run. *Ahead of dense* is how many times sooner a recipe gets to the Frechet distance of "
        "the dense network's end; where it does not get there, how much sooner the dense network is where the recipe "
        'is after equal time (below 1); "at least" and "at most" where the curve that is read begins there. ± and '
        "brackets are 95 % confidence intervals over the seeds (Student's t).",
        "",
        "Its limits: images of 16 or 196 positions, networks of half a million parameters, two CPU cores, where a "
        "step costs more than its matmuls, one learning rate for all, and early training: no run goes beyond "
        "twice the N images given below. At XL/2 and 256 x 256 the ratios of step times are larger; whether the ratios "
        "of quality carry over is not known.",
    ]
