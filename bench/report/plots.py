"""The plots of `bench.report`: throughput by resolution and mask ratio, measured speed-up and its FLOP bound, kernels.

Plots are drawn from rows only; a plot without rows is skipped with a note.
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from bench.report.compare import machine_of
from bench.report.derived import (
    FORMS,
    SIZES,
    STACKS,
    Rows,
    bound,
    dense_of,
    faster,
    is_beside_packed_alone,
    of_copy,
    rate,
    size_of,
)
from bench.rows import Row
from fastmask.files import atomic_write

COLOURS = dict(zip(STACKS, ("#bbbbbb", "#777777", "#8ecae6", "#1f6f9f"), strict=True))


def draw(rows: Rows, folder: Path) -> list[str]:
    """Draw the plots that have rows, and return a line for each plot."""
    steps = [r for r in rows.of("step") if r["variant"] in STACKS and r["case"]["form"] in FORMS]
    steps = [row for row in steps if not is_beside_packed_alone(rows, row)]
    steps = [row for row in steps if row.get("optimizer", True)]
    notes = []
    for name, plot, shown in (
        ("throughput", throughput, steps),
        ("speedup", lambda chosen: speedup(rows, chosen), [r for r in steps if dense_of(rows, r) is not None]),
        ("kernels", copies, [row for row in rows.of("kernel") if _by_memory(row)]),
    ):
        masked = [row for row in shown if name != "speedup" or row["case"]["form"] != "dense"]
        if not masked:
            notes.append(f"{name}.png: not drawn, there is no row for it")
        for machine in dict.fromkeys(map(machine_of, masked)):
            figure = plot([row for row in masked if machine_of(row) == machine])
            figure.suptitle(machine, fontsize=9)
            path = folder / f"{name}-{_slug(machine)}.png"
            _save(figure, path)
            notes.append(f"{path} drawn")
    return notes


def throughput(rows: list[Row]) -> Any:
    """Return a figure of images/s, with a panel per network and side, and a group per form."""
    panels = sorted({(size_of(row), row["case"]["image_size"], row["case"]["batch"]) for row in rows}, key=_by_size)
    figure, axes = plt.subplots(1, len(panels), figsize=(1 + 2.8 * len(panels), 3.4), squeeze=False)
    forms = [form for form in FORMS if any(row["case"]["form"] == form for row in rows)]
    for axis, panel in zip(axes[0], panels, strict=True):
        for row in rows:
            if (size_of(row), row["case"]["image_size"], row["case"]["batch"]) == panel:
                stack = STACKS.index(row["variant"])
                place = forms.index(row["case"]["form"]) + 0.2 * (stack - 1.5)
                spread = [[rate(row) * (1 - row["median_ms"] / row["p80_ms"])], [_above(row)]]
                axis.bar(place, rate(row), 0.18, color=COLOURS[row["variant"]], yerr=spread, ecolor="#333333")
        axis.set_xticks(range(len(forms)), forms, fontsize=7 if len(forms) < 4 else 5)
        axis.set_xlim(-0.6, len(forms) - 0.4)
        axis.set_title(f"{panel[0]}, {panel[1]}x{panel[1]}, batch {panel[2]}", fontsize=8)
    axes[0][0].set_ylabel("images/s")
    _legend(figure, COLOURS)
    return figure


def speedup(all_rows: Rows, rows: list[Row]) -> Any:
    """Return a figure of the speed-up over the dense DiT on the same stack, with its FLOP bound."""
    groups = sorted(
        {(size_of(r), r["case"]["image_size"], r["case"]["form"], r["case"]["batch"]) for r in rows}, key=_by_size
    )
    figure, axis = plt.subplots(figsize=(max(6.0, 2 + 1.3 * len(groups)), 3.4))
    for row in rows:
        case, dense = row["case"], dense_of(all_rows, row)
        place = groups.index((size_of(row), case["image_size"], case["form"], case["batch"]))
        axis.bar(
            place + 0.2 * (STACKS.index(row["variant"]) - 1.5), faster(row, dense), 0.18, color=COLOURS[row["variant"]]
        )
        axis.hlines(bound(row, dense), place - 0.42, place + 0.42, colors="#c1121f")
    labels = [f"{size}, {side}\n{form}\nbatch {batch}" for size, side, form, batch in groups]
    axis.set_xticks(range(len(groups)), labels, fontsize=7)
    axis.set_ylabel("speed against dense DiT, same stack")
    axis.axhline(1, color="#999999", linewidth=0.6)
    _legend(figure, {**COLOURS, "bound by FLOPs": "#c1121f"})
    return figure


def copies(rows: list[Row]) -> Any:
    """Return a figure of memory-bound kernels' effective bandwidth (minimum traffic), relative to a copy."""
    short = {"forward": "fwd", "forward_backward": "fwd+bwd", "float32": "fp32", "bfloat16": "bf16"}
    cases = [[short.get(row["case"][k], row["case"][k]) for k in ("op", "direction", "dtype", "shape")] for row in rows]
    names = [" ".join(case) for case in cases]
    places = {name: i for i, name in enumerate(sorted(set(names), reverse=True))}
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    colours = dict(zip(variants, plt.get_cmap("tab10").colors * len(variants), strict=False))
    figure, axis = plt.subplots(figsize=(10, 1.6 + 0.28 * len(places)))
    for name, row in zip(names, rows, strict=True):
        axis.plot(100 * of_copy(row), places[name], "o", color=colours[row["variant"]])
    axis.set_yticks(list(places.values()), list(places), fontsize=7)
    axis.set_xlim(0, 105 * max(1.0, *map(of_copy, rows)))
    axis.set_ylim(-0.6, len(places) - 0.4)
    axis.axvline(100, color="#999999", linewidth=0.6)
    axis.set_xlabel("percent of the measured copy bandwidth, by the minimum traffic")
    _legend(figure, colours, below=0.5)
    return figure


def _by_memory(row: Row) -> bool:
    """Return whether a kernel is memory-bound: it has no matmuls, and the copy bandwidth was measured."""
    return not row.get("flops") and ("copy_bandwidth" in row or "copy_percent" in row)


def _by_size(place: tuple[Any, ...]) -> tuple[Any, ...]:
    return (SIZES.index(place[0]) if place[0] in SIZES else len(SIZES), *map(str, place))


def _above(row: Row) -> float:
    return rate(row) * (row["median_ms"] / row["p20_ms"] - 1)


def _legend(figure: Any, colours: dict[str, Any], below: float = 0.24) -> None:
    """Put a legend below the axes, which end ``below`` inches above the edge."""
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    figure.legend(handles, list(colours), loc="lower center", ncol=len(colours), fontsize=7, frameon=False)
    figure.tight_layout(rect=(0, below / figure.get_figheight(), 1, 0.97))


def _save(figure: Any, path: Path) -> None:
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def _slug(machine: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in machine.lower()).split())
